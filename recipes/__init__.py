"""Recipes: one YAML file each."""

if __name__ != "vlmpeft.recipes":
    raise ImportError(
        "import vlmpeft.recipes instead: under the bare name 'recipes' everything would be registered twice"
    )
