#!/bin/sh
# Starts the SuperNode of the site @NAME@, with what stands in site.toml.
# It connects to the SuperLink and runs the app that the coordinator starts, as this user.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
. "$here/environment.sh"
settings=$(bouquet deploy site-settings "$here")
{ read -r superlink; read -r port; read -r node_config; read -r trusted || :; } <<END
$settings
END
cd -- "$here"
umask 077
@NOTICE@exec flower-supernode \
    --superlink "$superlink" \
    @SECURITY@ \
    --host 127.0.0.1 --port "$port" \
    --node-config "$node_config" \
    ${trusted:+--trusted-entities "$trusted"} "$@"
