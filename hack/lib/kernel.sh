# shellcheck shell=bash
# Debian kernel packages: finding, fetching and taking them apart. Source common.sh first; what downloads needs a
# scratch_dir.

# newest_package REGEX: the name of the newest package that matches, by version in its name, and that can be fetched.
newest_package() {
    local name
    while read -r name; do
        if apt-cache show --no-all-versions "$name" >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done < <(apt-cache pkgnames linux- | grep -Ex "$1" | sort -Vr)
    die "Debian's package lists have no package named like $1" "run apt-get update, or look at the sources in /etc/apt"
}

# fetch_package NAME FOLDER: downloads and unpacks NAME into FOLDER without installing it.
fetch_package() {
    mkdir -p "$2"
    (
        cd "${scratch:?}" || exit
        # As root throughout: apt's own user may not enter the cache.
        apt-get -qq -o APT::Sandbox::User=root download "$1" ||
            die "cannot download the package $1" "is the Debian mirror reachable? try: apt-get update"
        dpkg -x "$1"_*.deb "$2"
        rm -f "$1"_*.deb
    )
}

# uint FILE OFFSET BYTES: the little-endian number there.
uint() { od -An -tu"$3" -j "$2" -N "$3" "$1" | tr -d ' '; }

# unpack_vmlinux VMLINUZ ELF: takes the ELF kernel out of a bzImage (Documentation/arch/x86/boot.rst: setup_sects,
# payload_offset, payload_length). An ELF file boots without a guest having to decompress it.
unpack_vmlinux() {
    local vmlinuz=$1 elf=$2 sectors offset length
    local -a unpack
    sectors=$(uint "$vmlinuz" $((0x1f1)) 1)
    [ "$sectors" -gt 0 ] || sectors=4
    offset=$(uint "$vmlinuz" $((0x248)) 4)
    length=$(uint "$vmlinuz" $((0x24c)) 4)
    dd if="$vmlinuz" of="$elf.payload" bs=1M iflag=skip_bytes,count_bytes status=none \
        skip=$(((sectors + 1) * 512 + offset)) count="$length"
    case $(od -An -tx1 -N 6 "$elf.payload" | tr -d ' ') in
        28b52ffd*) unpack=(zstd -dcf) ;;
        fd377a585a00) unpack=(xz -dc --single-stream) ;;
        1f8b*) unpack=(gzip -dc) ;;
        *) die "$vmlinuz is compressed in a way that is not known here (known: zstd, xz, gzip)" ;;
    esac
    # Its tail is the length of the ELF file, which the unpackers complain of.
    "${unpack[@]}" <"$elf.payload" >"$elf" 2>/dev/null || true
    rm "$elf.payload"
    [ "$(od -An -tx1 -N 4 "$elf" | tr -d ' ')" = 7f454c46 ] || die "no ELF kernel in $vmlinuz"
}

# module_files FOLDER NAME...: the files of the named modules, each after those it depends on. FOLDER is
# .../lib/modules/RELEASE with modules.dep in it. A module that is built in has no file and none is printed;
# a name that is neither is an error.
module_files() {
    local folder=$1
    shift
    awk -v want="$*" '
        function name(path) { sub(/.*\//, "", path); sub(/\.ko.*/, "", path); gsub(/-/, "_", path); return path }
        FILENAME ~ /builtin$/ { built_in[name($0)] = 1; next }
        {
            file = $1; sub(/:$/, "", file); n = name(file); files[n] = file; needs[n] = ""
            for (i = NF; i > 1; i--) needs[n] = needs[n] " " name($i)
        }
        function put(n,   list, i, count) {
            if (n in done || n in built_in) return
            if (!(n in files)) { print "no module " n > "/dev/stderr"; failed = 1; return }
            done[n] = 1
            count = split(needs[n], list, " ")
            for (i = 1; i <= count; i++) put(list[i])
            print files[n]
        }
        END {
            gsub(/-/, "_", want)
            count = split(want, list, " ")
            for (k = 1; k <= count; k++) put(list[k])
            exit failed
        }' "$folder/modules.builtin" "$folder/modules.dep"
}

# copy_modules FOLDER TARGET NAME...: copies the named modules and what they need into TARGET, uncompressed, and writes
# TARGET/order: their file names in the order of loading.
copy_modules() {
    local folder=$1 target=$2 files file plain
    shift 2
    mkdir -p "$target"
    : >"$target/order"
    files=$(module_files "$folder" "$@") || die "the kernel in $folder lacks a module that is needed"
    for file in $files; do
        plain=${file##*/}
        plain=${plain%%.ko*}.ko
        case $file in
            *.xz) xz -dc "$folder/$file" ;;
            *.zst) zstd -dcq "$folder/$file" ;;
            *.gz) gzip -dc "$folder/$file" ;;
            *) cat "$folder/$file" ;;
        esac >"$target/$plain"
        echo "$plain" >>"$target/order"
    done
}

# pack_cpio FOLDER FILE: an initramfs part with FOLDER's content; the same content gives the same bytes.
pack_cpio() {
    (
        cd "$1" || exit
        find . -mindepth 1 -exec touch -hd @0 {} +
        find . -mindepth 1 | LC_ALL=C sort | cpio -o -H newc -R 0:0 --reproducible --quiet
    ) >"$2"
}
