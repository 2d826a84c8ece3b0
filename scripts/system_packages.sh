#!/usr/bin/env bash
# Installs what the slow tests need beside Python: Prometheus and Chromium, as Debian packages them.
set -euo pipefail
packages=(prometheus chromium)
missing=()
for package in "${packages[@]}"; do
    command -v "$package" >/dev/null || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
    echo "all there: ${packages[*]}"
    exit
fi
run=()
if [ "$(id -u)" -ne 0 ]; then
    run=(sudo)
fi
"${run[@]}" apt-get update -qq
# Debian starts a Prometheus of its own with the package; the tests want only the program.
"${run[@]}" env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
if command -v systemctl >/dev/null; then
    "${run[@]}" systemctl disable --now prometheus 2>/dev/null || true
fi
