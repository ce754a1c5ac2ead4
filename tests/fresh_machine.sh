#!/usr/bin/env bash
# make on a machine that has Python with venv, make and git and nothing else: no browser, compiler, sandbox or package manager,
# no earlier environment. It is this machine, seen from a mount namespace in which those programs cannot be run, with a
# clone of the last commit and a home of its own, which are deleted at the end.
#
#   tests/fresh_machine.sh demo test              targets and variables of make; as root and then as nobody, if root calls;
#                                                 else as the caller
#   AS=nobody tests/fresh_machine.sh test         as that user only
#   PYTHON=/usr/bin/python3.12                    the interpreter, which that user must be able to read
#
# PIP_*, TORCH_INDEX and pip's own configuration are passed on. Exits with 2 where such a namespace cannot be made.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-/usr/bin/python3}
search=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
hidden=(gcc g++ cc c++ clang clang++ nvcc chromium chromium-browser google-chrome google-chrome-stable
    firefox bwrap apt apt-get dnf yum apk brew)

refuse() {
    echo "fresh_machine: $*" >&2
    exit 2
}

for tool in git make unshare setpriv; do
    command -v "$tool" >/dev/null || refuse "$tool is not installed (unshare and setpriv are of util-linux, 2.38 or newer)"
done
namespace=(unshare --mount --propagation private)
if [[ $EUID -ne 0 ]]; then namespace=(unshare --map-root-user --mount --propagation private); fi
reason=$("${namespace[@]}" mount --bind /dev/null /dev/null 2>&1) ||
    refuse "no mount namespace can be made here (${reason:-no reason given}): call it as root, outside of a container" \
        "or in a privileged one, or let ordinary users make user namespaces"

paths=()
for program in "${hidden[@]}"; do
    while read -r path; do paths+=("$(readlink -f "$path")"); done < <(PATH=$search type -ap "$program" || true)
done

run() ( # USER ARGUMENT...
    user=$1 environment=() become=()
    shift
    number=$(id -u "$user" 2>/dev/null) || refuse "there is no user $user"
    if [[ $EUID -ne 0 ]]; then
        [[ $number -eq $EUID ]] || refuse "only root can become $user"
        # In the namespace the caller is root, which may mount; in one more inside of it again the caller.
        become=(unshare --user "--map-user=$number" "--map-group=$(id -g)")
    elif [[ $number -ne 0 ]]; then
        become=(setpriv --reuid "$number" --regid "$(id -g "$user")" --clear-groups --no-new-privs)
    fi
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    chmod 755 "$work"
    git clone -q "$repository" "$work/clone"
    mkdir -p "$work/home/.config/pip" "$work/tmp"
    for file in ~/.config/pip/pip.conf ~/.pip/pip.conf; do
        if [[ -r $file ]]; then cp "$file" "$work/home/.config/pip/pip.conf"; fi
    done
    if [[ $EUID -eq 0 ]]; then chown -R "$number" "$work"; fi
    while IFS= read -r line; do environment+=("$line"); done < <(env | grep -E '^(PIP_|TORCH_INDEX=)' || true)
    environment+=("PATH=$search" "HOME=$work/home" "TMPDIR=$work/tmp" "LANG=C.UTF-8" "USER=$user")
    echo "fresh_machine: make $* as $user in $work/clone"
    "${namespace[@]}" bash -euc '
        hidden=$1; shift
        for path in $hidden; do mount --bind /dev/null "$path"; done
        exec "$@"' fresh "${paths[*]}" "${become[@]}" env -i "${environment[@]}" \
        bash -euc 'for program in '"${hidden[*]}"'; do
            if [ -x "$(command -v $program)" ]; then echo "fresh_machine: $program can still be run" >&2; exit 2; fi
        done
        exec make -C "$@"' fresh "$work/clone" "PYTHON=$python" "$@"
)

if [[ -n ${AS:-} ]]; then
    run "$AS" "$@"
elif [[ $EUID -eq 0 ]]; then
    run root "$@"
    run nobody "$@"
else
    run "$(id -un)" "$@"
fi
