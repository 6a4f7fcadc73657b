#!/bin/sh
# Prints one line naming the first thing this machine lacks for building m2mkd, or nothing.
# Reads PYTHON and CXX. The Makefile shows the line as its own error.

fault() {
    echo "$1"
    exit 1
}

command -v "$PYTHON" >/dev/null 2>&1 ||
    fault "Python 3.10 or newer is needed, but '$PYTHON' was not found; install it or name one with PYTHON=/path/to/python3"

# Written so that Python 2 can run it too.
version=$("$PYTHON" -c 'import sys
print("%d.%d.%d" % sys.version_info[:3])
sys.exit(sys.version_info < (3, 10))' 2>/dev/null) ||
    fault "Python 3.10 or newer is needed, but '$PYTHON' is ${version:-not runnable}; install a newer one or name it with PYTHON=/path/to/python3"

# Debian and Ubuntu ship venv without ensurepip, so the first import alone proves nothing.
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
    fault "'$PYTHON' ($version) lacks the venv module; install it (Debian, Ubuntu: apt install python3-venv) or name another with PYTHON=/path/to/python3"

"$PYTHON" -c 'import os, sys, sysconfig
sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    fault "'$PYTHON' ($version) lacks its C headers; install them (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel) or name another with PYTHON=/path/to/python3"

# CXX may carry a launcher or flags ("ccache g++"), so only its first word is a command.
command -v "${CXX%% *}" >/dev/null 2>&1 ||
    fault "a C++20 compiler is needed, but '$CXX' was not found; install g++ 11 or clang 14 or newer, or name one with CXX=/path/to/g++"

printf '#include <concepts>\n#include <span>\n#if __cplusplus < 202002L\n#error\n#endif\n' |
    $CXX -std=c++20 -x c++ -fsyntax-only - >/dev/null 2>&1 ||
    fault "a C++20 compiler is needed, but '$CXX' is $($CXX --version 2>/dev/null | sed -n 1p); install g++ 11 or clang 14 or newer, or name one with CXX=/path/to/g++"
