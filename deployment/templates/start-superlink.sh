#!/bin/sh
# Starts the SuperLink of the deployment @LINK@, in this folder: runs/ and superlink.db lie here.
# SuperNodes connect to port @FLEET_PORT@. The operator's port, @CONTROL_PORT@, asks for no password: who reaches
# it can start runs, and with them code at every site. It listens on this machine only; keep it so.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
. "$here/environment.sh"
cd -- "$here"
umask 077
@SITE_KEYS@@NOTICE@exec flower-superlink \
    @SECURITY@ \
    --fleet-api-address @BIND@:@FLEET_PORT@ \
    --host 127.0.0.1 --port @CONTROL_PORT@ \
    --database 'sqlite:///superlink.db?plugin=bouquet' \
    --disable-runtime-dependency-installation "$@"
