#!/bin/bash
#
# A composite value that is held while its type is altered: what may still be
# read is not what the change has done to the value.
#
# Versions   15.20-0+deb12u1, beside 15.18-0+deb12u1 where that is harmless (17.12
#            and 18's sibling have the same change: CVE-2026-6460).
# Guess      15.20 refuses a value whose layout the ALTER has changed, and lets what
#            can be read as before be read as before.  Values from before the update
#            have no version, so they can't be refused.
# Behaviour  ALTER TYPE ... ALTER ATTRIBUTE ... TYPE gives a new version to the
#            attribute *and to all that follow it*, whatever it changes.  A value is
#            refused if an attribute that it has is newer than the value, or the
#            value newer than the type: SQLSTATE 22P07, "row type of datum tuple was
#            altered after the datum's creation"; which type it was is told only in
#            the server's log.  So
#            - a value is refused after an ALTER to the type that the attribute
#              had, or only of its collation, which 15.18 reads rightly;
#            - it stays so when the attribute is altered back, and when it is
#              dropped, so that nothing of it would be read;
#            - a value that was made while an ALTER was in progress that was then
#              rolled back is refused, though the type is as it was ("using outdated
#              tuple descriptor when deforming row type");
#            - ADD, RENAME and DROP ATTRIBUTE refuse nothing, also DROP and ADD of
#              the same name with another type, nor does an ALTER of an attribute
#              that is younger than the value;
#            - a value that was stored before the update is refused after an ALTER
#              under 15.20: no version counts as the oldest.
#            Values are held by cursors WITH HOLD, variables in PL/pgSQL, and by
#            extensions in memory of their own.
#
set -euo pipefail

# shellcheck source=findings/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

old=15.18-0+deb12u1
new=15.20-0+deb12u1
need bookworm
get 15 "$old"
get 15 "$new"

# Makes a value, alters its type, and reads the value.  With undo, a value is
# made after the ALTERs, which are then rolled back.
# shellcheck disable=SC2016 # dollar quotes
reader='
CREATE OR REPLACE FUNCTION held(alters text[], undo bool) RETURNS text LANGUAGE plpgsql AS $f$
DECLARE
  r record;
  command text;
BEGIN
  SELECT ROW(7, $$seven$$)::held AS v INTO r;
  BEGIN
    FOREACH command IN ARRAY alters LOOP
      EXECUTE $$ALTER TYPE held $$ || command;
    END LOOP;
    IF undo THEN
      EXECUTE $$SELECT ROW(8, $q$eight$q$)::held AS v$$ INTO r;
      RAISE EXCEPTION USING ERRCODE = $$UNDO0$$;
    END IF;
  EXCEPTION WHEN SQLSTATE $$UNDO0$$ THEN
  END;
  BEGIN
    RETURN r.v::text;
  EXCEPTION WHEN OTHERS THEN
    RETURN SQLSTATE || $$ $$ || SQLERRM;
  END;
END
$f$;
'
# held VERSION UNDO ALTER...: in a session of its own, the type made anew
held() {
	local version=$1 undo=$2 alters
	shift 2
	alters=$(printf ", '%s'" "$@")
	sql "$version" <<-SQL
		SET client_min_messages = warning;
		DROP TYPE IF EXISTS held CASCADE;
		CREATE TYPE held AS (a int, b text);
		$reader
		SELECT held(ARRAY[${alters#, }], $undo);
	SQL
}

all() {
	held "$1" false 'ALTER ATTRIBUTE b TYPE text'
	held "$1" false 'ALTER ATTRIBUTE b TYPE text COLLATE "C"'
	held "$1" false 'ALTER ATTRIBUTE b TYPE varchar' 'ALTER ATTRIBUTE b TYPE text'
	held "$1" false 'ALTER ATTRIBUTE b TYPE varchar' 'DROP ATTRIBUTE b'
	held "$1" true 'ALTER ATTRIBUTE b TYPE varchar'
	held "$1" false 'ADD ATTRIBUTE c int' 'ALTER ATTRIBUTE c TYPE bigint'
	held "$1" false 'DROP ATTRIBUTE b' 'ADD ATTRIBUTE b int'
	held "$1" false 'RENAME ATTRIBUTE b TO c'
}

make "$old" before
start "$old" before
expect "15.18 reads all of them" "$(all "$old")" <<'SEEN'
(7,seven)
(7,seven)
(7,seven)
(7)
(8,eight)
(7,seven,)
(7,)
(7,seven)
SEEN
sql "$old" <<'SQL'
CREATE TYPE stored AS (a int, b text);
CREATE TABLE rows (v stored);
INSERT INTO rows VALUES (ROW(7, 'seven'));
SQL
stop "$old" before

start "$new" before
expect "15.20: what was stored before the update" "$(sql "$new" <<'SQL'
TABLE rows;
DO $$
DECLARE
  r record;
BEGIN
  SELECT v INTO r FROM rows;
  DROP TABLE rows;
  ALTER TYPE stored ALTER ATTRIBUTE b TYPE text;
  RAISE 'not refused: %', r.v;
EXCEPTION WHEN SQLSTATE '22P07' THEN
  RAISE '%', SQLERRM;
END
$$;
SQL
)" <<'SEEN'
(7,seven)
ERROR:  row type of datum tuple was altered after the datum's creation
CONTEXT:  PL/pgSQL function inline_code_block line 10 at RAISE
SEEN
expect "15.20 refuses the first five" "$(all "$new")" <<'SEEN'
22P07 row type of datum tuple was altered after the datum's creation
22P07 row type of datum tuple was altered after the datum's creation
22P07 row type of datum tuple was altered after the datum's creation
22P07 row type of datum tuple was altered after the datum's creation
22P07 using outdated tuple descriptor when deforming row type
(7,seven,)
(7,)
(7,seven)
SEEN
stop "$new" before
finish
