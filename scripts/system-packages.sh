#!/usr/bin/env bash
# Installs the Debian and Ubuntu packages that pip cannot bring.  Run as root: sudo scripts/system-packages.sh
#
#   g++          compiles DeepSpeed's communication op
#   make         runs the Makefile
#   python3-dev  Python.h, for the same op
#   python3-venv virtual environments
set -euo pipefail
apt-get update
apt-get install --yes --no-install-recommends g++ make python3-dev python3-venv
