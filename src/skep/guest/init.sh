#!/bin/sh
# The guest's first process. What it does is told by the kernel's command line:
#   skep.poweroff        power off as soon as BOOT was printed
#   skep.exec=BASE64     run this shell script, print "EXIT status", power off
#   root=DEVICE          mount this root (also by LABEL= or UUID=; read-only unless there is `rw`) and become its init=
#   none of these        an interactive shell on the console; the guest powers off when it ends
echo BOOT
export PATH=/bin HOME=/root TERM=vt100 PS1='skep# '
mount -t proc proc /proc
read -r words < /proc/cmdline
script= root= mode=ro real_init=/sbin/init
for word in $words; do
    case $word in
        skep.poweroff) poweroff -f ;;
        skep.exec=*) script=${word#skep.exec=} ;;
        root=*) root=${word#root=} ;;
        init=*) real_init=${word#init=} ;;
        ro | rw) mode=$word ;;
    esac
done
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts
mount -t devpts pts /dev/pts

# NAME.order lists a driver's modules, those that others need first; drivers share some.
loaded=' '
load() {
    while read -r module; do
        case $loaded in
            *" $module "*) ;;
            *) insmod "/lib/modules/$module"; loaded="$loaded$module " ;;
        esac
    done < "/lib/modules/$1.order"
}

# The virtio devices that are there, by their PCI device IDs (the second: of transitional ones, as QEMU has them).
for device in $(cat /sys/bus/pci/devices/*/device 2> /dev/null); do
    case $device in
        0x1042 | 0x1001) load virtio_pci; load virtio_blk ;;
        0x1043 | 0x1003) load virtio_pci; load virtio_console ;;
        0x1044 | 0x1005) load virtio_pci; load virtio_rng ;;
    esac
done

# With a virtio console alone there was none when we were started. Its port takes a moment to appear.
if ! [ -e /proc/self/fd/1 ]; then
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        (: > /dev/console) 2> /dev/null && exec < /dev/console > /dev/console 2>&1 && break
        sleep 0.2
    done
fi

# Mounts the real root on /mnt. Its device may take a moment to appear.
mount_root() {
    load ext4
    tries=100
    until
        case $root in
            LABEL=* | UUID=*) device=$(findfs "$root") ;;
            *) device=$root ;;
        esac
        [ -b "$device" ]
    do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || { echo "init: there is no root=$root"; return 1; }
        sleep 0.1
    done
    mount -o "$mode" "$device" /mnt
}

if [ -n "$root" ] && [ -z "$script" ] && mount_root; then
    umount /dev/pts /proc /sys
    mount --move /dev /mnt/dev
    exec switch_root /mnt "$real_init"
fi

if [ -n "$script" ]; then
    echo "$script" | base64 -d > /tmp/script
    sh /tmp/script
    echo "EXIT $?"
    poweroff -f
fi

# The power button: acpid runs the programs that lie in /etc/acpi.
load button
load evdev
acpid -l /dev/null

cd /root || exit
# A session of its own with the console as its terminal, so that the shell has job control.
setsid cttyhack sh
poweroff -f
