"""`make bench`: the real modules against the limit of the machine and against the plain way."""
