# The shell row: arithmetic, strings, patterns and functions, without a single fork.
total=0
even() {
    case $1 in
        *[02468]) return 0 ;;
    esac
    return 1
}
i=0
while [ "$i" -lt 10000 ]; do
    i=$((i + 1))
    if even "$i"; then
        total=$((total + i * 3))
    else
        total=$((total ^ i))
    fi
    word="item-$i-of-many"
    word=${word%-of-*}
    set -- "$word" "${word#item-}"
    [ "$1" = "item-$2" ] || echo "wrong: $1 $2"
done
echo "$total"
