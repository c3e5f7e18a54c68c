#!/usr/bin/env bash
# pack.sh ARCHIVE: this checkout as it stands, committed or not, but for what git ignores.
set -euo pipefail
archive=$(realpath -m "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p "$(dirname "$archive")"
temporary=$(mktemp)
trap 'rm -f "$temporary"' EXIT
git ls-files -z --cached --others --exclude-standard --deduplicate |
  while IFS= read -r -d '' file; do # what is deleted but not yet committed is still listed
    if [ -e "$file" ] || [ -L "$file" ]; then printf '%s\0' "$file"; fi
  done |
  tar --null --files-from=- -czf "$temporary"
cp "$temporary" "$archive"
