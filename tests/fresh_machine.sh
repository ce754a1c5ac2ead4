#!/usr/bin/env bash
# make TARGET... on a machine that has Python with venv, make and git and nothing else: no browser, no compiler, no package
# manager, no earlier environment. It is this machine, seen from a mount namespace in which those programs cannot be run,
# with a clone of the last commit and a home of its own.
#
#   tests/fresh_machine.sh TARGET...              as root and as an ordinary user, if root calls; else as the caller
#   AS=nobody tests/fresh_machine.sh TARGET...    as that user only
#   PYTHON=/usr/bin/python3.12                    the interpreter, which that user must be able to read
#
# Needs util-linux (unshare, setpriv); PIP_* and pip's own configuration are passed on.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-/usr/bin/python3}
search=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
hidden=(gcc g++ cc c++ clang clang++ nvcc chromium chromium-browser google-chrome google-chrome-stable
    firefox apt apt-get dnf yum apk brew)

paths=()
for program in "${hidden[@]}"; do
    while read -r path; do paths+=("$(readlink -f "$path")"); done < <(PATH=$search type -ap "$program" || true)
done

run() { # USER TARGET...
    local user=$1 work environment=() become=() namespace=(--mount)
    shift
    work=$(mktemp -d)
    chmod 755 "$work"
    git clone -q "$repository" "$work/clone"
    mkdir -p "$work/home/.config/pip" "$work/tmp"
    for file in ~/.config/pip/pip.conf ~/.pip/pip.conf; do
        if [[ -r $file ]]; then cp "$file" "$work/home/.config/pip/pip.conf"; fi
    done
    if [[ $EUID -eq 0 && $user != root ]]; then
        chown -R "$user" "$work"
        become=(setpriv --reuid "$user" --regid "$(id -g "$user")" --clear-groups --no-new-privs)
    elif [[ $EUID -ne 0 ]]; then
        namespace+=(--map-root-user)
    fi
    while IFS= read -r line; do environment+=("$line"); done < <(env | grep '^PIP_' || true)
    environment+=("PATH=$search" "HOME=$work/home" "TMPDIR=$work/tmp" "LANG=C.UTF-8" "USER=$user")
    echo "fresh_machine: make $* as $user in $work/clone"
    unshare "${namespace[@]}" --propagation private bash -euc '
        hidden=$1; shift
        for path in $hidden; do mount --bind /dev/null "$path"; done
        exec "$@"' fresh "${paths[*]}" "${become[@]}" env -i "${environment[@]}" \
        bash -euc 'for program in '"${hidden[*]}"'; do
            if [ -x "$(command -v $program)" ]; then echo "fresh_machine: $program can still be run" >&2; exit 2; fi
        done
        exec make -C "$@"' fresh "$work/clone" "PYTHON=$python" "$@"
    rm -rf "$work"
}

if [[ -n ${AS:-} ]]; then
    run "$AS" "$@"
elif [[ $EUID -eq 0 ]]; then
    run root "$@"
    run nobody "$@"
else
    run "$(id -un)" "$@"
fi
