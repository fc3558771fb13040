#!/usr/bin/env bash
# Runs the C++ test on an emulated processor with AVX-512: Bochs boots Debian's kernel with the test as its only process.
# All files are in build/avx512; the log of the run is build/avx512/serial.log.
#
#   AVX512_KERNEL=/boot/vmlinuz-...   use this kernel instead of the one from `apt-get download`
#   AVX512_SECONDS=1800               time limit of the machine
set -euo pipefail
cd "$(dirname "$0")/../../.."
out=$PWD/build/avx512
mkdir -p "$out/image/isolinux" "$out/root"
rm -f "$out/serial.log"

fail() {
    echo "avx512-check: $*" >&2
    exit 1
}

# -- what it needs ------------------------------------------------------------------------------------------------------
bios=/usr/share/bochs/BIOS-bochs-latest vga=/usr/share/vgabios/vgabios.bin
isolinux=/usr/lib/ISOLINUX/isolinux.bin ldlinux=/usr/lib/syslinux/modules/bios/ldlinux.c32
missing=()
need() { command -v "$2" > /dev/null || compgen -G "$2" > /dev/null || missing+=("$1"); }
need bochs bochs
need bochs-term "/usr/lib/*/bochs/plugins/libbx_term_gui.so"
need bochsbios $bios
need vgabios $vga
need isolinux $isolinux
need syslinux-common $ldlinux
need xorriso xorriso
need cpio cpio
need cmake cmake
[ ${#missing[@]} = 0 ] || fail "Debian packages are missing: apt-get install --no-install-recommends ${missing[*]}"

kernel=${AVX512_KERNEL:-}
if [ -z "$kernel" ]; then
    command -v apt-get > /dev/null || fail "apt-get is not available; set AVX512_KERNEL to a Linux kernel"
    package=$(apt-cache depends linux-image-cloud-amd64 2> /dev/null | sed -n 's/^ *Depends: //p' | head -1)
    [ -n "$package" ] || fail "apt does not know linux-image-cloud-amd64; run apt-get update, or set AVX512_KERNEL to a Linux kernel"
    kernel=$out/$package/boot/vmlinuz-${package#linux-image-}
    if [ ! -e "$kernel" ]; then
        (cd "$out" && apt-get -q download "$package") || fail "could not download $package; run apt-get update"
        dpkg -x "$out/$package"_*.deb "$out/$package"
        rm "$out/$package"_*.deb
    fi
fi
[ -r "$kernel" ] || fail "kernel $kernel does not exist"

# -- the test, static, and a disk to start it from ----------------------------------------------------------------------
static() { "${CXX:-c++}" -print-file-name="$1"; }
cmake -S . -B "$out/cmake" -DCLIPERASE_PYTHON=OFF -DCLIPERASE_CUDA=OFF -DCMAKE_EXE_LINKER_FLAGS=-static \
    -DOpenMP_gomp_LIBRARY="$(static libgomp.a)" -DOpenMP_pthread_LIBRARY="$(static libpthread.a)" > "$out/cmake.log"
cmake --build "$out/cmake" --target test_cpu --parallel >> "$out/cmake.log" 2>&1 || { cat "$out/cmake.log"; exit 1; }
cp "$out/cmake/test_cpu" "$out/root/test_cpu"
"${CC:-cc}" -O1 -Wall -Werror -static csrc/tests/avx512/init.c -o "$out/root/init"
(cd "$out/root" && printf 'init\ntest_cpu\n' | cpio --quiet -o -H newc) > "$out/image/isolinux/initrd"
cp "$kernel" "$out/image/isolinux/vmlinuz"
cp $isolinux $ldlinux "$out/image/isolinux/"
# Bochs misreports the size of the compact layout that XSAVEC and XSAVES have; Linux would turn AVX off for that.
cat > "$out/image/isolinux/isolinux.cfg" << 'END'
DEFAULT test
LABEL test
  KERNEL vmlinuz
  INITRD initrd
  APPEND console=ttyS0 quiet panic=-1 mitigations=off clearcpuid=xsavec,xsaves
END
xorriso -as mkisofs -quiet -o "$out/test.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4 \
    -boot-info-table "$out/image" 2> /dev/null

# -- the machine --------------------------------------------------------------------------------------------------------
cat > "$out/bochsrc" << END
cpu: model=corei7_skylake_x, count=1, ips=50000000
clock: sync=none
megs: 512
romimage: file=$bios
vgaromimage: file=$vga
ata0-master: type=cdrom, path="$out/test.iso", status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev="$out/serial.log"
config_interface: textconfig
display_library: term
sound: waveoutdrv=dummy
log: "$out/bochs.log"
panic: action=fatal
END
echo continue > "$out/debugger"  # Debian's Bochs starts in its debugger
echo "avx512-check: starting the emulated machine; this takes minutes"
status=0
TERM=xterm timeout -s KILL "${AVX512_SECONDS:-1800}" bochs -q -f "$out/bochsrc" -rc "$out/debugger" \
    < /dev/null > "$out/bochs.out" 2>&1 || status=$?
[ $status != 137 ] || echo "avx512-check: stopped after ${AVX512_SECONDS:-1800} s" >&2

log=$(tr -d '\r' < "$out/serial.log") || fail "the machine did not start; see $out/bochs.out and $out/bochs.log"
echo "$log"
for line in "chosen: avx512" "avx512 ran, 0 failures" "the test exited with 0"; do
    grep -qxF "$line" <<< "$log" || fail "FAILED: the log does not contain \"$line\""
done
echo "avx512-check: passed"
