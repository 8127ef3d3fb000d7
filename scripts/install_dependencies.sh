#!/usr/bin/env bash
# install_dependencies.sh FILE...: installs the Debian packages listed in the files, those that are missing, through apt.
# Prints the command before it runs; sudo only when not root. Nothing happens when all are there.
set -euo pipefail

missing=()
for package in $(cat "$@"); do
  status=$(dpkg-query -W -f='${Status}' "$package" 2>/dev/null || true)
  [ "$status" = "install ok installed" ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo)
run() {
  echo "+ $*"
  "$@"
}
echo "These packages are missing: ${missing[*]}"
run "${as_root[@]}" apt-get update -q
run "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
