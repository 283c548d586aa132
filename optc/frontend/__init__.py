"""The frontend: from a name, a module or a file to a Program."""
