"""Steering of visual tokens and attention diagnostics."""

if __name__ != "vlmpeft.steering":
    raise ImportError(
        "import vlmpeft.steering instead: under the bare name 'steering' everything would be registered twice"
    )
