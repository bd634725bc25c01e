# Run in a guest and on its host: what it prints must be the same. $WORK is a directory to make.
exec 2>&1
rm -rf "$WORK" && mkdir "$WORK" && cd "$WORK" || exit 1
export LC_ALL=C OPENSSL_CONF=/dev/null

cat > work.py << 'END'
import bz2, decimal, fractions, hashlib, io, itertools, json, lzma, random, re, sqlite3, struct, zlib

random.seed(4)
table = {f"key{i}": [random.random(), random.getrandbits(80), None, "\u00e9\u4e2d" * (i % 5)] for i in range(2000)}
text = json.dumps(table, sort_keys=True)
assert json.loads(text) == table
print(hashlib.sha256(text.encode()).hexdigest(), len(text))
data = text.encode() * 4
for name in ("md5", "sha1", "sha224", "sha384", "sha512", "sha3_256", "shake_128", "blake2b", "blake2s"):
    one = hashlib.new(name, data)
    print(name, one.hexdigest(16) if name == "shake_128" else one.hexdigest())
print(zlib.crc32(data), zlib.adler32(data), hashlib.pbkdf2_hmac("sha256", b"secret", b"salt", 1000).hex())
for pack in (zlib, bz2, lzma):
    packed = pack.compress(data)
    assert pack.decompress(packed) == data
    print(pack.__name__, len(packed) < len(data) // 2)
with decimal.localcontext() as context:
    context.prec = 300
    print(decimal.Decimal(2).sqrt(), decimal.Decimal(7).ln(), (decimal.Decimal(1) / 3).exp())
print(sum((fractions.Fraction(1, n * n) for n in range(1, 200)), fractions.Fraction(0)))
print(pow(3, 10**6, 10**40 + 7), 7**1234 % 10**50, 2**4000 // 3**1000)
x, history = 0.5, []
for _ in range(20000):  # doubles, as the standard rounds them
    x = (3.99 * x * (1 - x)) ** 1 + 1e-17
    history.append(x)
print(x.hex(), sum(history).hex(), struct.pack("<f", x).hex(), sorted(history)[10000].hex(), f"{x:.17g} {x:.3e}")
sieve = bytearray([1]) * 200000
for i in range(2, 448):
    if sieve[i]:
        sieve[i * i :: i] = bytes(len(range(i * i, 200000, i)))
print(sum(sieve) - 2)
words = re.findall(r"[a-f]+\d+", hashlib.sha512(data).hexdigest() * 200)
print(len(words), sorted(set(words))[:5], max(itertools.groupby(words), key=lambda pair: len(pair[0]))[0])
base = sqlite3.connect(":memory:")
base.execute("create table t (a integer primary key, b real, c text)")
base.executemany("insert into t values (?, ?, ?)", ((i, i / 7, f"{i:x}") for i in range(3000)))
print(base.execute("select sum(a), sum(b), max(c), count(distinct length(c)) from t where a % 3 = 1").fetchone())
with open("data", "wb") as out:
    out.write(random.randbytes(300000) + data)
END
"$PYTHON" work.py

sha1sum data; sha224sum data; sha256sum data; sha384sum data; sha512sum data; md5sum data; b2sum data; cksum data
gzip -9 < data > data.gz && gzip -dc data.gz | cmp - data && gzip -lv data.gz | awk 'END { print $2, $7 }'
gzip -1 < data | gzip -dc | sha256sum

for digest in md5 sha1 sha224 sha256 sha384 sha512 sha512-256 sha3-224 sha3-256 sha3-512 blake2b512 blake2s256 sm3 ripemd160; do
    openssl dgst -$digest data
done
openssl dgst -sha256 -hmac secret data
key=000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f iv=f0e0d0c0b0a090807060504030201000
for cipher in aes-128-cbc aes-256-cbc aes-128-ctr aes-256-ctr aes-256-ofb aes-128-cfb chacha20 camellia-128-cbc \
    camellia-256-ctr aria-256-cbc sm4-cbc des-ede3-cbc; do
    case $cipher in
        *128* | sm4*) bits=$(echo $key | cut -c 1-32) ;;
        des*) bits=$(echo $key | cut -c 1-48) ;;
        *) bits=$key ;;
    esac
    case $cipher in des*) at=$(echo $iv | cut -c 1-16) ;; *) at=$iv ;; esac
    openssl enc -$cipher -K "$bits" -iv "$at" -in data -out packed
    echo "$cipher $(sha256sum < packed)"
    openssl enc -d -$cipher -K "$bits" -iv "$at" -in packed | cmp - data && echo "and back"
done
openssl prime 170141183460469231731687303715884105727
sort data | uniq -c | sort -rn | sha256sum
sqlite3 base 'pragma journal_mode=wal; create table t (a, b); with recursive n(i) as (select 1 union all select i + 1
    from n where i < 3000) insert into t select i, i * 1.5 from n; select count(*), sum(b), max(a) from t;'
sqlite3 base 'pragma integrity_check'
