#!/bin/sh
# Makes a Debian root, and an ext4 image of it without mounting anything of ours.
#   root.sh SUITE MIRROR ARCH KERNEL_DEB TREE IMAGE SIZE
# It runs as root, or as a user namespace's root, in mount and PID namespaces of its own: what debootstrap mounts in TREE
# and whoever it starts are gone with it, and so is the root itself: it is made in memory, half a gigabyte. Whenever this
# is cut off, nothing is left that only another owner could remove. Lines that begin with "I: " are for the user.
set -eu
suite=$1 mirror=$2 arch=$3 kernel=$4 tree=$5 image=$6 size=$7
packages=systemd,systemd-sysv,udev,dbus,login,procps,kmod,iproute2,netbase,e2fsprogs,python3,openssl,gzip,sqlite3
# The same everywhere, so that the same files give the same image as far as mke2fs lets them.
uuid=736b6570-2d72-4f6f-8000-000000000001

umask 022
export LC_ALL=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t tmpfs -o mode=755,size=2G root "$tree"
# To debootstrap this is a container, where it binds the devices that it may not make.
export container=lxc
debootstrap --variant=minbase --arch="$arch" --include="$packages" "$suite" "$tree" "$mirror"

echo "I: Modules of ${kernel##*/}"
dpkg-deb --fsys-tarfile "$kernel" | tar -x --keep-directory-symlink -C "$tree" --wildcards './lib/modules/*'
for modules in "$tree"/lib/modules/*; do
    chroot "$tree" depmod "${modules##*/}"
done

echo "I: Settings"
echo debian > "$tree/etc/hostname"
printf '127.0.0.1\tlocalhost\n127.0.1.1\tdebian\n::1\tlocalhost ip6-localhost ip6-loopback\n' > "$tree/etc/hosts"
printf 'UUID=%s / ext4 errors=remount-ro 0 1\n' "$uuid" > "$tree/etc/fstab"
echo LANG=C.UTF-8 > "$tree/etc/default/locale"
# Each machine that boots it chooses an identity of its own.
: > "$tree/etc/machine-id"
rm -f "$tree/var/lib/dbus/machine-id" "$tree/var/lib/systemd/random-seed"
# Root has no password, so nobody can log in with one; whoever has the console is root.
mkdir -p "$tree/etc/systemd/system/serial-getty@.service.d"
cat > "$tree/etc/systemd/system/serial-getty@.service.d/autologin.conf" << 'END'
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --keep-baud 115200,57600,38400,9600 - $TERM
END
# The first port of a virtio-console has a login too, when there is one, be it the kernel's console or not.
cat > "$tree/etc/udev/rules.d/90-hvc.rules" << 'END'
SUBSYSTEM=="tty", KERNEL=="hvc0", TAG+="systemd", ENV{SYSTEMD_WANTS}+="serial-getty@hvc0.service"
END

rm -rf "$tree"/dev/* "$tree"/debootstrap "$tree"/var/cache/apt/* "$tree"/var/lib/apt/lists/* "$tree"/var/log/*.log
rm -rf "$tree"/var/log/apt "$tree"/var/cache/ldconfig "$tree"/var/cache/debconf/*-old "$tree"/var/lib/dpkg/*-old

echo "I: Writing the image"
truncate -s "$size" "$image"
mke2fs -q -t ext4 -d "$tree" -L debian -U "$uuid" -m 1 \
    -E "hash_seed=$uuid,lazy_itable_init=0,lazy_journal_init=0" "$image"
