#!/bin/bash
#
# A minor update of PostgreSQL changes the bytes of composite values: each row
# that has one is "changed" once.
#
# Versions   15.18-0+deb12u1, then 15.20-0+deb12u1 on the same data directory
#            (17.12 and 18's sibling have the same change).
# Guess      Composite values compare field by field, and a minor update needs no
#            dump, so nothing is seen of it by who only reads and writes them.
# Behaviour  Since 15.20 a composite value has a version of its row type in its
#            header.  Values that were stored before have none, and one that is
#            made now of a type from before has "version 0", written in other
#            bytes.  What compares values as whole images takes the two for
#            different, though they are equal:
#            - REFRESH MATERIALIZED VIEW CONCURRENTLY deletes and inserts every
#              row with such a column, the first time after the update;
#            - suppress_redundant_updates_trigger() lets every such row through,
#              once;
#            - *= says that rows with a composite value in a field differ.
#            =, DISTINCT, array equality and hashing look at fields: they agree.
#            A program that stores composite values by their bytes, or uses them
#            as keys, has to make the headers alike.
#
set -euo pipefail

# shellcheck source=findings/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

old=15.18-0+deb12u1
new=15.20-0+deb12u1
need bookworm
get 15 "$old"
get 15 "$new"

make "$old" data
start "$old" data
sql "$old" <<'SQL'
CREATE TYPE point3 AS (x int, y int, label text);
CREATE TYPE pair AS (p point3, n int);
CREATE TABLE source (id int PRIMARY KEY, x int, y int);
INSERT INTO source SELECT i, i, -i FROM generate_series(1, 1000) i;
CREATE MATERIALIZED VIEW view AS SELECT id, ROW(x, y, 'l')::point3 AS p FROM source;
CREATE UNIQUE INDEX ON view (id);
CREATE TABLE kept (id int, p point3);
INSERT INTO kept SELECT id, p FROM view;
CREATE TRIGGER suppress BEFORE UPDATE ON kept
  FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger();
SQL

# How many rows the statement has written anew, and what comparisons say
# shellcheck disable=SC2016 # dollar quotes
look='
CREATE TEMP TABLE places AS SELECT id, ctid AS place FROM view;
REFRESH MATERIALIZED VIEW CONCURRENTLY view;
SELECT $$rows of the view that moved: $$ || count(*) FROM view JOIN places USING (id) WHERE place <> view.ctid;
DROP TABLE places;
CREATE TEMP TABLE places AS SELECT id, ctid AS place FROM kept;
UPDATE kept SET p = ROW((p).x, (p).y, (p).label)::point3;
SELECT $$rows of the table that moved: $$ || count(*) FROM kept JOIN places USING (id) WHERE place <> kept.ctid;
DROP TABLE places;
'
# shellcheck disable=SC2016 # dollar quotes
compare='
SELECT $$same image: $$ || (ROW(p, 1)::pair *= ROW(ROW(1, -1, $$l$$)::point3, 1)::pair),
       $$equal: $$ || (p = ROW(1, -1, $$l$$)::point3),
       $$equal in an array: $$ || (ARRAY[p] = ARRAY[ROW(1, -1, $$l$$)::point3]),
       $$same hash: $$ || (hash_record(ROW(p, 1)) = hash_record(ROW(ROW(1, -1, $$l$$)::point3, 1)))
FROM kept WHERE id = 1;
'
expect "before the update nothing moves" "$(sql "$old" <<<"$compare $look")" <<'SEEN'
same image: true|equal: true|equal in an array: true|same hash: true
rows of the view that moved: 0
rows of the table that moved: 0
SEEN
stop "$old" data
start "$new" data
expect "after it everything moves, once" "$(sql "$new" <<<"$compare $look $compare $look")" <<'SEEN'
same image: false|equal: true|equal in an array: true|same hash: true
rows of the view that moved: 1000
rows of the table that moved: 1000
same image: true|equal: true|equal in an array: true|same hash: true
rows of the view that moved: 0
rows of the table that moved: 0
SEEN
stop "$new" data
finish
