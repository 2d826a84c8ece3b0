#!/usr/bin/env bash
# Installs the Debian and Ubuntu packages that pip cannot bring.  Run as root: sudo scripts/system-packages.sh [--slow-tests]
#
#   g++          compiles DeepSpeed's communication op
#   make         runs the Makefile
#   python3-dev  Python.h, for the same op
#   python3-venv virtual environments
#
# and for `make test-slow`, with --slow-tests:
#
#   prometheus   scrapes the cluster that the tests start
#   chromium     opens its dashboard
set -euo pipefail
packages=(g++ make python3-dev python3-venv)
if [ "${1:-}" = --slow-tests ]; then
    packages+=(prometheus chromium)
fi
apt-get update
apt-get install --yes --no-install-recommends "${packages[@]}"
# Debian's package starts a Prometheus of its own; the tests start theirs.
if [ "${1:-}" = --slow-tests ] && command -v systemctl >/dev/null; then
    systemctl disable --now prometheus 2>/dev/null || true
fi
