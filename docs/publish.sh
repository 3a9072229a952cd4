#!/usr/bin/env bash
# Puts a built manual on the branch gh-pages, in a folder of its own, and lists all versions on the first page.
#
#   docs/publish.sh v1.2.3 docs/_build/html      # or dev, for what is on main
set -euo pipefail

version="${1#v}" built="$(cd "$2" && pwd)"
pages="$(mktemp -d)"
trap 'git worktree remove --force "$pages"' EXIT

if git fetch origin gh-pages; then
    git worktree add --force --detach "$pages" FETCH_HEAD
else
    git worktree add --orphan -B gh-pages "$pages"
fi
cd "$pages"
rm -rf "./$version"
cp -r "$built" "./$version"
touch .nojekyll
{
    echo '<!doctype html><meta charset="utf-8"><title>torchtrainer</title><h1>torchtrainer: manuals by version</h1><ul>'
    for folder in $(find . -maxdepth 1 -mindepth 1 -type d -not -name '.*' -printf '%f\n' | sort --version-sort --reverse); do
        echo "<li><a href=\"$folder/\">$folder</a></li>"
    done
    echo '</ul>'
} >index.html
git add --all
git -c user.name=docs -c user.email=docs@localhost commit --quiet --message "The manual of $version" || exit 0
git push origin HEAD:gh-pages
