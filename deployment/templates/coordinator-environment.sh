# For the scripts beside it, and for a person's shell: . @FOLDER@/environment.sh
# Bouquet and Flower are looked for in BOUQUET_BIN, then in PATH.
FLWR_HOME="${here:-@FOLDER@}/flower"        # Flower writes here and nowhere else
FLWR_TELEMETRY_ENABLED=0                    # Flower would report its use to its makers
FLWR_DISABLE_UPDATE_CHECK=1                 # and ask them for newer versions
PATH="${BOUQUET_BIN:-@BIN@}:$PATH"
export FLWR_HOME FLWR_TELEMETRY_ENABLED FLWR_DISABLE_UPDATE_CHECK PATH
