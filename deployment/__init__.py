"""Deployment: certificates, keys, start scripts, checks before a run, and the status of one."""
