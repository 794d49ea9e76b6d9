"""Complete runs: each file picks options from conf/ and states what it reproduces."""
