"""Benchmarks and scorers for vision-language models."""

if __name__ != "vlmpeft.eval":
    raise ImportError("import vlmpeft.eval instead: under the bare name 'eval' everything would be registered twice")
