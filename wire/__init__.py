"""What travels between server and clients: the codec of adapters, number formats, local rules."""
