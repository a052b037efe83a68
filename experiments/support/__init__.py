"""Modules that the commands share: flags, data, files, pictures, timing."""
