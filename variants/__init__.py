"""One model in, verified variants out; and how a variant runs. Never imports `server`."""
