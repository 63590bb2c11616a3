"""One reader per form of `--data`; `teachercache.data.read` chooses among them."""
