#!/bin/bash
#
# Back to the minor release before, and forward again: warnings in every session,
# and settings of columns that can't be changed.
#
# Versions   15.20-0+deb12u1, 15.18-0+deb12u1, 15.20-0+deb12u1 on one data directory.
# Guess      Minor releases have the same format on disk, so one can go back to the
#            release before when the new one makes trouble, and forward later.
# Behaviour  15.20 gives every column of what is created a version, as the option
#            pg_attver among the column's options (pg_attribute.attoptions).
#            - 15.18 does not know it.  ALTER TABLE ... ALTER ... SET of any option,
#              n_distinct for example, fails there with "unrecognized parameter",
#              until the column's pg_attver is RESET, which 15.18 allows.
#            - A column that is added by 15.18 to what 15.20 has created gets no
#              version.  Back on 15.20 each session that touches the table gets
#              "attribute versions of relation ... are non-monotonic", as a WARNING
#              to the client and in the log, for ever; VACUUM FULL does not help.
#              What does: alter the column to the type that it has.  Of a
#              composite type that a table uses that is refused.
#            - 15.20 takes SET (pg_attver = ...) and does nothing, without a word.
#
set -euo pipefail

# shellcheck source=findings/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

old=15.18-0+deb12u1
new=15.20-0+deb12u1
need bookworm
get 15 "$old"
get 15 "$new"
make "$new" data

# WAL positions are never the same
positions() {
	sed -E 's#[0-9A-F]+/[0-9A-F]{2,}#…/…#g'
}

start "$new" data
expect "15.20: a user's version is ignored" "$(sql "$new" <<'SQL'
CREATE TYPE tag AS (a int, b text);
CREATE TABLE items (id int, tag tag);
INSERT INTO items VALUES (1, ROW(1, 'x'));
SELECT attoptions[1] AS before FROM pg_attribute WHERE attrelid = 'items'::regclass AND attname = 'id' \gset
ALTER TABLE items ALTER id SET (pg_attver = 5);
SELECT attoptions[1] = :'before' FROM pg_attribute WHERE attrelid = 'items'::regclass AND attname = 'id';
SQL
)" <<'SEEN'
t
SEEN
stop "$new" data

start "$old" data
expect "15.18: options of columns can't be set, and columns added" "$(sql "$old" <<'SQL'
TABLE items;
ALTER TABLE items ALTER id SET (n_distinct = 5);
ALTER TABLE items ALTER id RESET (pg_attver);
ALTER TABLE items ALTER id SET (n_distinct = 5);
ALTER TABLE items ADD more int;
ALTER TYPE tag ADD ATTRIBUTE c int;
TABLE items;
SQL
)" <<'SEEN'
1|(1,x)
ERROR:  unrecognized parameter "pg_attver"
1|(1,x,)|
SEEN
stop "$old" data

start "$new" data
warnings=$(cat <<'SEEN'
WARNING:  attribute versions of relation "items" are non-monotonic
LINE 1: TABLE items;
              ^
DETAIL:  Version 0/0 of attribute "more" at position 3 is lower than version …/… of attribute "tag" at position 2.
WARNING:  attribute versions of relation "tag" are non-monotonic
DETAIL:  Version 0/0 of attribute "c" at position 3 is lower than version …/… of attribute "b" at position 2.
1|(1,x,)|
SEEN
)
for session in first second; do
	expect "15.20 again: warnings in the $session session" "$(sql "$new" <<<'TABLE items;' | positions)" <<<"$warnings"
done
sql "$new" <<<'VACUUM FULL items;' >/dev/null
expect "15.20 again: and after VACUUM FULL" "$(sql "$new" <<<'TABLE items;' | positions)" <<<"$warnings"
sql "$new" <<<'ALTER TABLE items ALTER more TYPE int;' >/dev/null
expect "15.20 again: the table can be mended, the type can't" "$(sql "$new" <<'SQL' | positions
TABLE items;
ALTER TYPE tag ALTER ATTRIBUTE c TYPE int;
SQL
)" <<'SEEN'
WARNING:  attribute versions of relation "tag" are non-monotonic
DETAIL:  Version 0/0 of attribute "c" at position 3 is lower than version …/… of attribute "b" at position 2.
1|(1,x,)|
ERROR:  cannot alter type "tag" because column "items.tag" uses it
SEEN
stop "$new" data
finish
