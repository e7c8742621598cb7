--
-- sb_trigger: keeps counts of a table's rows
--
SET client_min_messages = warning;
CREATE SCHEMA sb_trig;
SET search_path = sb_trig, public;

-- The buffers here are never flushed, so what they hold must be what the
-- tables have.  This shows each key that is counted wrong, and by how much.
CREATE FUNCTION tell(key anyelement, counter bigint) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION wrong(buffer regclass, key_columns text, counted regclass, columns text)
RETURNS TABLE (key text, off bigint) LANGUAGE plpgsql AS $$
BEGIN
  RETURN QUERY EXECUTE format(
    'SELECT k::text, sum(c)::bigint
       FROM (SELECT ROW(%s) AS k, n AS c FROM %s UNION ALL SELECT ROW(%s), -1 FROM %s) s
       GROUP BY k HAVING sum(c) <> 0 ORDER BY k', key_columns, buffer, columns, counted);
END $$;

--
-- Row by row
--
CREATE TABLE likes (id int PRIMARY KEY, note text, post_id text);
CREATE FOREIGN TABLE like_counts (post text, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'sb_trig.tell', interval '1h', timeout '1h');
CREATE TRIGGER count_likes AFTER INSERT OR UPDATE OR DELETE ON likes
  FOR EACH ROW EXECUTE FUNCTION sb_trigger('like_counts', 'post_id');

INSERT INTO likes VALUES (1, 'x', 'a'), (2, 'x', 'a'), (3, 'x', 'b'), (4, 'x', NULL);
SELECT * FROM like_counts ORDER BY post;
-- A row that goes counts down, one that changes its key both.
DELETE FROM likes WHERE id = 1;
UPDATE likes SET post_id = 'c' WHERE id = 2;
UPDATE likes SET post_id = NULL WHERE id = 3;
UPDATE likes SET post_id = 'd' WHERE id = 4;
SELECT * FROM like_counts ORDER BY post;
SELECT * FROM wrong('like_counts', 'post', 'likes', 'post_id');
-- An update that leaves the key as it is counts nothing, not even a 0.
INSERT INTO likes VALUES (5, 'x', 'e');
CREATE FOREIGN TABLE other_counts (post text, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'sb_trig.tell', interval '1h', timeout '1h');
CREATE TRIGGER count_others AFTER UPDATE ON likes
  FOR EACH ROW EXECUTE FUNCTION sb_trigger('other_counts', 'post_id');
BEGIN;
UPDATE likes SET note = 'y', post_id = post_id;
UPDATE likes SET post_id = upper(post_id) WHERE id = 2;
SELECT sb_count('e', 'other_counts') AS e, sb_count('c', 'other_counts') AS c,
       sb_count('C', 'other_counts') AS up;
ROLLBACK;
DROP TRIGGER count_others ON likes;
-- What is rolled back is not counted.
BEGIN;
INSERT INTO likes VALUES (6, 'x', 'f');
SAVEPOINT s;
INSERT INTO likes VALUES (7, 'x', 'f'), (8, 'x', 'g');
ROLLBACK TO s;
INSERT INTO likes VALUES (7, 'x', 'h');
COMMIT;
DO $$
BEGIN
  FOR i IN 10 .. 15 LOOP
    BEGIN
      INSERT INTO likes VALUES (i, 'x', 'i'), (i / 14, 'x', 'i');
    EXCEPTION WHEN unique_violation THEN
      INSERT INTO likes VALUES (i, 'x', 'j');
    END;
  END LOOP;
END $$;
SELECT * FROM like_counts WHERE post >= 'f' ORDER BY post;
SELECT * FROM wrong('like_counts', 'post', 'likes', 'post_id');
-- INSERT ... ON CONFLICT
INSERT INTO likes VALUES (2, 'x', 'z'), (20, 'x', 'z'), (21, 'x', 'z')
  ON CONFLICT (id) DO UPDATE SET post_id = EXCLUDED.post_id || '2';
INSERT INTO likes VALUES (2, 'x', 'zz'), (22, 'x', 'zz') ON CONFLICT DO NOTHING;
SELECT * FROM like_counts WHERE post >= 'z' ORDER BY post;
-- MERGE
MERGE INTO likes l
  USING (VALUES (2, 'm'), (20, NULL), (30, 'm'), (31, 'm')) v (id, post) ON l.id = v.id
  WHEN MATCHED AND v.post IS NULL THEN DELETE
  WHEN MATCHED THEN UPDATE SET post_id = v.post
  WHEN NOT MATCHED THEN INSERT VALUES (v.id, 'x', v.post);
SELECT * FROM like_counts WHERE post >= 'm' ORDER BY post;
-- COPY
COPY likes FROM stdin;
40	x	copied
41	x	copied
42	x	\N
43	x	copied, too
\.
SELECT * FROM like_counts WHERE post LIKE 'copied%' ORDER BY post;
-- Long keys, that are compressed or kept apart in the table.
INSERT INTO likes VALUES (50, 'x', repeat('long', 400));
ALTER TABLE likes ALTER post_id SET STORAGE EXTERNAL;
INSERT INTO likes VALUES (51, 'x', repeat('long', 400)),
  (52, repeat('x', 3000), repeat('long', 400));
UPDATE likes SET post_id = repeat('long', 400) WHERE id = 50;
UPDATE likes SET post_id = repeat('Long', 400) WHERE id = 51;
SELECT left(post, 4) AS post, n FROM like_counts WHERE length(post) > 100 ORDER BY post;
SELECT * FROM wrong('like_counts', 'post', 'likes', 'post_id');
DELETE FROM likes;
SELECT * FROM like_counts;
SELECT * FROM wrong('like_counts', 'post', 'likes', 'post_id');
DROP TRIGGER count_likes ON likes;

--
-- A statement at a time
--
CREATE TRIGGER likes_in AFTER INSERT ON likes
  REFERENCING NEW TABLE AS came FOR EACH STATEMENT
  EXECUTE FUNCTION sb_trigger('like_counts', 'post_id');
CREATE TRIGGER likes_out AFTER DELETE ON likes
  REFERENCING OLD TABLE AS gone FOR EACH STATEMENT
  EXECUTE FUNCTION sb_trigger('like_counts', 'post_id');
CREATE TRIGGER likes_up AFTER UPDATE ON likes
  REFERENCING OLD TABLE AS gone NEW TABLE AS came FOR EACH STATEMENT
  EXECUTE FUNCTION sb_trigger('like_counts', 'post_id');
INSERT INTO likes SELECT i, 'x', 'p' || i % 7 FROM generate_series(1, 1000) i;
INSERT INTO likes SELECT i, 'x', NULL FROM generate_series(1001, 1010) i;
INSERT INTO likes SELECT 0, 'x', 'none' WHERE false;
SELECT * FROM like_counts ORDER BY post;
DELETE FROM likes WHERE id % 10 = 3;
SELECT * FROM like_counts ORDER BY post;
UPDATE likes SET post_id = 'q' || id % 3, note = 'y' WHERE id <= 500;
UPDATE likes SET note = 'z';
UPDATE likes SET post_id = coalesce(post_id, 'was null');
SELECT * FROM like_counts ORDER BY post;
SELECT * FROM wrong('like_counts', 'post', 'likes', 'post_id');
BEGIN;
SAVEPOINT s;
DELETE FROM likes;
ROLLBACK TO s;
SELECT * FROM wrong('like_counts', 'post', 'likes', 'post_id');
COMMIT;
-- One statement may fire several of them.
INSERT INTO likes SELECT i, 'x', 'r' FROM generate_series(1, 1500) i
  ON CONFLICT (id) DO UPDATE SET post_id = 's';
MERGE INTO likes l USING generate_series(1000, 2000) v ON l.id = v
  WHEN MATCHED AND v % 2 = 0 THEN DELETE
  WHEN MATCHED THEN UPDATE SET post_id = 't'
  WHEN NOT MATCHED THEN INSERT VALUES (v, 'x', 'u');
WITH gone AS (DELETE FROM likes WHERE id < 100 RETURNING id),
     came AS (INSERT INTO likes SELECT 10000 + id, 'x', 'v' FROM gone)
UPDATE likes SET post_id = 'w' WHERE id BETWEEN 100 AND 199;
SELECT * FROM like_counts ORDER BY post;
SELECT * FROM wrong('like_counts', 'post', 'likes', 'post_id');
-- Others may read the same transition table, before and after.
CREATE TABLE log (what text, rows bigint);
CREATE FUNCTION log_rows() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  c refcursor;
  r record;
BEGIN
  OPEN c FOR SELECT * FROM came;
  FETCH c INTO r;
  INSERT INTO log SELECT TG_NAME, count(*) FROM came;
  RETURN NULL;
END $$;
CREATE TRIGGER a_log AFTER INSERT ON likes REFERENCING NEW TABLE AS came
  FOR EACH STATEMENT EXECUTE FUNCTION log_rows();
CREATE TRIGGER z_log AFTER INSERT ON likes REFERENCING NEW TABLE AS came
  FOR EACH STATEMENT EXECUTE FUNCTION log_rows();
INSERT INTO likes SELECT i, 'x', 'l' FROM generate_series(20001, 20050) i;
SELECT * FROM log;
SELECT * FROM wrong('like_counts', 'post', 'likes', 'post_id');
-- Row triggers may have transition tables, too.
DROP TRIGGER likes_in ON likes;
CREATE TRIGGER likes_in AFTER INSERT ON likes
  REFERENCING NEW TABLE AS came FOR EACH ROW
  EXECUTE FUNCTION sb_trigger('like_counts', 'post_id');
INSERT INTO likes SELECT i, 'x', 'm' FROM generate_series(30001, 30003) i;
SELECT * FROM wrong('like_counts', 'post', 'likes', 'post_id');
DELETE FROM likes;
SELECT * FROM like_counts;
DROP TABLE log, likes;

--
-- Many rows: what is copied in is counted, by both kinds of triggers
--
CREATE TABLE many (id int, key int, label text);
CREATE FOREIGN TABLE by_key (key int NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'sb_trig.tell', interval '1h', timeout '1h');
CREATE FOREIGN TABLE by_label (label text NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'sb_trig.tell', interval '1h', timeout '1h');
CREATE TRIGGER each AFTER INSERT OR UPDATE OR DELETE ON many
  FOR EACH ROW EXECUTE FUNCTION sb_trigger('by_key', 'key');
CREATE TRIGGER all_in AFTER INSERT ON many REFERENCING NEW TABLE AS came
  FOR EACH STATEMENT EXECUTE FUNCTION sb_trigger('by_label', 'label');
CREATE TRIGGER all_up AFTER UPDATE ON many REFERENCING OLD TABLE AS gone NEW TABLE AS came
  FOR EACH STATEMENT EXECUTE FUNCTION sb_trigger('by_label', 'label');
CREATE TRIGGER all_out AFTER DELETE ON many REFERENCING OLD TABLE AS gone
  FOR EACH STATEMENT EXECUTE FUNCTION sb_trigger('by_label', 'label');
-- enough to have the transition tables on disk
SET work_mem = '64kB';
INSERT INTO many SELECT i, i / 10, 'label ' || i % 300 FROM generate_series(1, 20000) i;
UPDATE many SET key = key + 1, label = CASE WHEN id % 2 = 0 THEN label ELSE 'odd' END
  WHERE id > 5000;
DELETE FROM many WHERE id % 4 = 0;
RESET work_mem;
SELECT count(*), sum(n) FROM by_key;
SELECT count(*), sum(n) FROM by_label;
SELECT * FROM wrong('by_key', 'key', 'many', 'key');
SELECT * FROM wrong('by_label', 'label', 'many', 'label');
DROP TABLE many;
DROP FOREIGN TABLE by_key, by_label;

--
-- Several key columns, of any type, wherever they are in the table
--
CREATE DOMAIN place AS varchar(5) CHECK (value <> 'nil');
CREATE TYPE pair AS (x int, y text);
CREATE FUNCTION pair_of(text) RETURNS pair IMMUTABLE LANGUAGE sql
  AS 'SELECT (length($1), $1)::sb_trig.pair';
CREATE CAST (text AS pair) WITH FUNCTION pair_of(text) AS ASSIGNMENT;
CREATE TABLE visits (
  junk text, at date, "Where" place, more int, who int, tags text[], spot pair,
  word text, twice int GENERATED ALWAYS AS (who * 2) STORED);
ALTER TABLE visits DROP junk, DROP more;
CREATE FOREIGN TABLE visit_counts (
    gone int, who bigint NOT NULL, place text, at timestamp, tags text[], spot pair, made pair,
    twice numeric(10, 2), n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'sb_trig.tell', interval '1h', timeout '1h');
ALTER FOREIGN TABLE visit_counts DROP gone;
CREATE TRIGGER count_visits AFTER INSERT OR UPDATE OR DELETE ON visits
  FOR EACH ROW EXECUTE FUNCTION
  sb_trigger('visit_counts', 'who', 'Where', 'at', 'tags', 'spot', 'word', 'twice');
INSERT INTO visits (at, "Where", who, tags, spot, word) VALUES
  ('2024-02-29', 'here', 1, '{a,b}', '(1,one)', 'w'),
  ('2024-02-29', 'here', 1, '{a,b}', '(1,one)', 'w'),
  ('2024-02-29', 'there', 1, '{a,b}', '(1,one)', NULL),
  (NULL, NULL, 2, NULL, NULL, NULL);
SELECT * FROM visit_counts ORDER BY who, place;
UPDATE visits SET spot.y = 'two', who = who + 1;
UPDATE visits SET spot = spot, tags = tags, word = word || '';
SELECT * FROM visit_counts ORDER BY who, place;
DELETE FROM visits WHERE "Where" = 'here';
SELECT * FROM visit_counts ORDER BY who, place;
SELECT * FROM wrong('visit_counts', 'who, place, at, tags, spot, made, twice', 'visits',
                    'who::bigint, "Where"::text, at::timestamp, tags, spot, pair_of(word), twice::numeric(10, 2)');
-- A null for a column that must not be null, a value that is too large:
-- errors, and nothing is done.
INSERT INTO visits (who, "Where") VALUES (NULL, 'here');
\echo :LAST_ERROR_SQLSTATE
DROP TABLE visits;
CREATE TABLE visits (who numeric, word text);
CREATE FOREIGN TABLE small (who smallint, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'sb_trig.tell', interval '1h', timeout '1h');
CREATE TRIGGER count_small AFTER INSERT OR UPDATE OR DELETE ON visits
  FOR EACH ROW EXECUTE FUNCTION sb_trigger('small', 'who');
INSERT INTO visits VALUES (1), (2), (2.4), (1.6), (NULL);
INSERT INTO visits VALUES (2), (40000);
\echo :LAST_ERROR_SQLSTATE
-- what differs in the table and is the same in the buffer has not changed
BEGIN;
TRUNCATE small;
UPDATE visits SET who = who + 0.1;
SELECT sb_count(1::smallint, 'small'), sb_count(2::smallint, 'small');
ROLLBACK;
UPDATE visits SET who = who + 0.5;
SELECT * FROM small ORDER BY who;
SELECT * FROM wrong('small', 'who', 'visits', 'who::smallint');
DROP TRIGGER count_small ON visits;
CREATE TRIGGER small_in AFTER INSERT ON visits REFERENCING NEW TABLE AS came
  FOR EACH STATEMENT EXECUTE FUNCTION sb_trigger('small', 'who');
CREATE TRIGGER small_up AFTER UPDATE ON visits REFERENCING OLD TABLE AS gone NEW TABLE AS came
  FOR EACH STATEMENT EXECUTE FUNCTION sb_trigger('small', 'who');
INSERT INTO visits SELECT i / 10.0 FROM generate_series(1, 100) i;
UPDATE visits SET who = who + 0.25;
SELECT * FROM wrong('small', 'who', 'visits', 'who::smallint');
DROP FOREIGN TABLE small, visit_counts;
DROP TABLE visits;
-- A cast may do anything: change the table, roll back; but not alter the
-- buffer.
CREATE TYPE tagged AS (tag text);
CREATE TABLE tags (tag text);
CREATE FOREIGN TABLE tag_counts (tag tagged, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'sb_trig.tell', interval '1h', timeout '1h');
CREATE FUNCTION tag_effects(t text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF t = 'nest' THEN
    INSERT INTO sb_trig.tags VALUES ('nested'), ('nested too');
  ELSIF t = 'alter' THEN
    ALTER FOREIGN TABLE sb_trig.tag_counts ADD more text;
  ELSIF t = 'undo' THEN
    BEGIN
      INSERT INTO sb_trig.tags VALUES ('undone');
      RAISE division_by_zero;
    EXCEPTION WHEN division_by_zero THEN
    END;
  END IF;
END $$;
-- Who says so of a cast is believed.
CREATE FUNCTION make_tag(t text) RETURNS tagged LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
  PERFORM sb_trig.tag_effects(t);
  RETURN ROW(t);
END $$;
CREATE CAST (text AS tagged) WITH FUNCTION make_tag AS ASSIGNMENT;
CREATE TRIGGER count_tags AFTER INSERT OR UPDATE OR DELETE ON tags
  FOR EACH ROW EXECUTE FUNCTION sb_trigger('tag_counts', 'tag');
INSERT INTO tags VALUES ('a'), ('nest'), ('b'), ('undo'), ('c'), ('undo');
UPDATE tags SET tag = CASE tag WHEN 'a' THEN 'nest' ELSE 'undo' END WHERE tag IN ('a', 'b');
INSERT INTO tags VALUES ('alter');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM tag_counts ORDER BY tag;
SELECT * FROM wrong('tag_counts', 'tag', 'tags', 'ROW(tag)::sb_trig.tagged');
DROP TRIGGER count_tags ON tags;
CREATE TRIGGER tags_in AFTER INSERT ON tags REFERENCING NEW TABLE AS came
  FOR EACH STATEMENT EXECUTE FUNCTION sb_trigger('tag_counts', 'tag');
INSERT INTO tags VALUES ('a'), ('nest'), ('b'), ('undo'), ('c'), ('undo');
INSERT INTO tags VALUES ('alter');
SELECT * FROM wrong('tag_counts', 'tag', 'tags', 'ROW(tag)::sb_trig.tagged');
DROP TABLE tags;
DROP FOREIGN TABLE tag_counts;
DROP TYPE tagged CASCADE;
DROP FUNCTION tag_effects(text);
-- A single key column of a row type; one that is passed by value.
CREATE TABLE spots (spot pair, flag boolean);
CREATE FOREIGN TABLE spot_counts (spot pair NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'sb_trig.tell', interval '1h', timeout '1h');
CREATE FOREIGN TABLE flag_counts (flag boolean, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'sb_trig.tell', interval '1h', timeout '1h');
CREATE TRIGGER count_spots AFTER INSERT OR UPDATE OR DELETE ON spots
  FOR EACH ROW EXECUTE FUNCTION sb_trigger('spot_counts', 'spot');
CREATE TRIGGER count_flags AFTER INSERT OR UPDATE OR DELETE ON spots
  FOR EACH ROW EXECUTE FUNCTION sb_trigger('flag_counts', 'flag');
INSERT INTO spots VALUES ('(1,one)', true), ('(1,one)', NULL), ('(1,One)', false), ('(,)', false);
UPDATE spots SET spot = (1, 'one') WHERE (spot).x = 1;
DELETE FROM spots WHERE flag IS NULL;
SELECT * FROM spot_counts ORDER BY spot;
SELECT * FROM flag_counts ORDER BY flag;
INSERT INTO spots VALUES (NULL, true);
DROP FOREIGN TABLE spot_counts, flag_counts;
DROP TABLE spots;
DROP TYPE pair CASCADE;
DROP DOMAIN place;

--
-- Some rows only: the others have no key, or one that the handler ignores
--
CREATE TABLE soft (id int, post text, deleted boolean DEFAULT false,
  live_post text GENERATED ALWAYS AS (CASE WHEN NOT deleted THEN post END) STORED);
CREATE TRIGGER count_soft AFTER INSERT OR DELETE OR UPDATE OF live_post ON soft
  FOR EACH ROW EXECUTE FUNCTION sb_trigger('like_counts', 'live_post');
INSERT INTO soft VALUES (1, 'a', false), (2, 'a', false), (3, 'a', false), (4, 'b', true);
UPDATE soft SET deleted = true WHERE id = 1;
UPDATE soft SET deleted = false WHERE id = 4;
UPDATE soft SET id = id;
DELETE FROM soft WHERE id IN (1, 2);
SELECT * FROM like_counts ORDER BY post;
SELECT * FROM wrong('like_counts', 'post', 'soft', 'live_post');
DROP TABLE soft;
TRUNCATE like_counts;

--
-- Partitioned tables: each partition has its own column numbers
--
CREATE TABLE parted (a int, key text, b int) PARTITION BY RANGE (a);
CREATE TABLE parted1 PARTITION OF parted FOR VALUES FROM (0) TO (10);
CREATE TABLE parted2 (x int, y int, key text, b int, a int);
ALTER TABLE parted2 DROP x, DROP y;
ALTER TABLE parted ATTACH PARTITION parted2 FOR VALUES FROM (10) TO (20);
CREATE TRIGGER count_rows AFTER INSERT OR UPDATE OR DELETE ON parted
  FOR EACH ROW EXECUTE FUNCTION sb_trigger('like_counts', 'key');
CREATE TABLE parted3 (b int, a int, key text);
ALTER TABLE parted ATTACH PARTITION parted3 FOR VALUES FROM (20) TO (30);
INSERT INTO parted SELECT i, 'k' || i % 3, i FROM generate_series(0, 29) i;
INSERT INTO parted2 (a, key) VALUES (11, 'direct');
SELECT * FROM like_counts ORDER BY post;
-- rows that move, with their key and with another one
UPDATE parted SET a = a + 10 WHERE a < 15;
UPDATE parted SET a = a - 10, key = 'moved' WHERE a >= 27;
SELECT * FROM like_counts ORDER BY post;
SELECT * FROM wrong('like_counts', 'post', 'parted', 'key');
-- what is detached is counted no more, in neither way
SELECT sum(n) FROM like_counts;
ALTER TABLE parted DETACH PARTITION parted1;
DELETE FROM parted1;
SELECT sum(n) FROM like_counts;
DELETE FROM parted;
DROP TRIGGER count_rows ON parted;
DROP TABLE parted1;
CREATE TABLE parted1 PARTITION OF parted FOR VALUES FROM (0) TO (10);
TRUNCATE like_counts;
-- the same by statements
CREATE TRIGGER stmt_in AFTER INSERT ON parted REFERENCING NEW TABLE AS came
  FOR EACH STATEMENT EXECUTE FUNCTION sb_trigger('like_counts', 'key');
CREATE TRIGGER stmt_up AFTER UPDATE ON parted REFERENCING OLD TABLE AS gone NEW TABLE AS came
  FOR EACH STATEMENT EXECUTE FUNCTION sb_trigger('like_counts', 'key');
CREATE TRIGGER stmt_out AFTER DELETE ON parted REFERENCING OLD TABLE AS gone
  FOR EACH STATEMENT EXECUTE FUNCTION sb_trigger('like_counts', 'key');
INSERT INTO parted SELECT i, 'k' || i % 3, i FROM generate_series(0, 29) i;
UPDATE parted SET a = a + 10 WHERE a < 15;
UPDATE parted SET a = a - 10, key = 'moved' WHERE a >= 27;
SELECT * FROM wrong('like_counts', 'post', 'parted', 'key');
-- a row that is on its way and does not arrive is gone
CREATE FUNCTION stay_out() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER stay_out BEFORE INSERT ON parted1
  FOR EACH ROW WHEN (NEW.b = 12) EXECUTE FUNCTION stay_out();
UPDATE parted SET a = 5, key = 'k' || b WHERE b BETWEEN 10 AND 14;
SELECT count(*) FROM parted WHERE b BETWEEN 10 AND 14;
SELECT * FROM wrong('like_counts', 'post', 'parted', 'key');
DELETE FROM parted;
SELECT * FROM like_counts;
-- Rows that go with their partition are not counted down: DROP, DETACH and
-- ATTACH fire no trigger, nor does TRUNCATE of a partition the one that
-- forbids it for the table.
CREATE TRIGGER no_truncate BEFORE TRUNCATE ON parted
  EXECUTE FUNCTION sb_trigger('like_counts', 'key');
INSERT INTO parted VALUES (1, 'a', 0), (2, 'b', 0), (11, 'a', 0), (12, 'c', 0), (21, 'c', 0);
TRUNCATE parted;
TRUNCATE parted3;
DROP TABLE parted1;
SELECT * FROM wrong('like_counts', 'post', 'parted', 'key');
-- They are when the transaction does it that detaches the partition; and
-- those of one that is attached are counted up.
CREATE TABLE coming (a int, key text, b int);
INSERT INTO coming VALUES (1, 'new', 0), (2, 'new', 0);
TRUNCATE like_counts;
INSERT INTO like_counts SELECT key, count(*) FROM parted GROUP BY key;
BEGIN;
ALTER TABLE parted DETACH PARTITION parted2;
INSERT INTO like_counts SELECT key, -count(*) FROM parted2 GROUP BY key;
DROP TABLE parted2;
ALTER TABLE parted ATTACH PARTITION coming FOR VALUES FROM (0) TO (10);
INSERT INTO like_counts SELECT key, count(*) FROM coming GROUP BY key;
COMMIT;
SELECT * FROM wrong('like_counts', 'post', 'parted', 'key');
SELECT * FROM like_counts;
DROP TABLE parted;
TRUNCATE like_counts;

--
-- Inheritance: row triggers are the table's own, statement triggers see the
-- rows of the children of the table that the statement names
--
CREATE TABLE mother (id int, key text);
CREATE TABLE child (extra int) INHERITS (mother);
CREATE TRIGGER rows AFTER INSERT OR UPDATE OR DELETE ON mother
  FOR EACH ROW EXECUTE FUNCTION sb_trigger('like_counts', 'key');
INSERT INTO mother VALUES (1, 'm');
INSERT INTO child VALUES (2, 'c');
UPDATE mother SET key = key || '2';
SELECT * FROM like_counts ORDER BY post;
DROP TRIGGER rows ON mother;
TRUNCATE like_counts;
CREATE TRIGGER stmt AFTER UPDATE ON mother REFERENCING OLD TABLE AS gone NEW TABLE AS came
  FOR EACH STATEMENT EXECUTE FUNCTION sb_trigger('like_counts', 'key');
UPDATE mother SET key = key || '3';
UPDATE child SET key = key || '4';
SELECT * FROM like_counts ORDER BY post;
DROP TABLE child, mother;
TRUNCATE like_counts;

--
-- Foreign tables: buffers are some, so what is counted can be counted
--
CREATE FOREIGN TABLE first_counts (a int, key text, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'sb_trig.tell', interval '1h', timeout '1h');
CREATE TRIGGER second AFTER INSERT ON first_counts
  FOR EACH ROW EXECUTE FUNCTION sb_trigger('like_counts', 'key');
INSERT INTO first_counts VALUES (1, 'a', 10), (2, 'a', 20), (3, 'b', 30);
SELECT * FROM first_counts ORDER BY a;
SELECT * FROM like_counts ORDER BY post;
DROP FOREIGN TABLE first_counts;
TRUNCATE like_counts;

--
-- Foreign keys that cascade
--
CREATE TABLE posts (id text PRIMARY KEY);
CREATE TABLE votes (post text REFERENCES posts ON UPDATE CASCADE ON DELETE CASCADE);
CREATE TRIGGER count_votes AFTER INSERT OR UPDATE OR DELETE ON votes
  FOR EACH ROW EXECUTE FUNCTION sb_trigger('like_counts', 'post');
INSERT INTO posts VALUES ('a'), ('b'), ('c');
INSERT INTO votes VALUES ('a'), ('a'), ('b'), ('c'), ('c'), ('c');
DELETE FROM posts WHERE id = 'a';
UPDATE posts SET id = 'd' WHERE id = 'c';
SELECT * FROM like_counts ORDER BY post;
SELECT * FROM wrong('like_counts', 'post', 'votes', 'post');
DROP TABLE votes, posts;
TRUNCATE like_counts;

--
-- Constraint triggers that run at the commit
--
CREATE TABLE later (key text);
CREATE CONSTRAINT TRIGGER count_later AFTER INSERT OR UPDATE OR DELETE ON later
  DEFERRABLE INITIALLY DEFERRED
  FOR EACH ROW EXECUTE FUNCTION sb_trigger('like_counts', 'key');
BEGIN;
INSERT INTO later VALUES ('a'), ('a'), ('b');
UPDATE later SET key = 'c' WHERE key = 'b';
SELECT * FROM like_counts;
COMMIT;
SELECT * FROM like_counts ORDER BY post;
BEGIN;
INSERT INTO later VALUES ('d');
SAVEPOINT s;
INSERT INTO later VALUES ('e');
ROLLBACK TO s;
SET CONSTRAINTS ALL IMMEDIATE;
SELECT * FROM like_counts ORDER BY post;
INSERT INTO later VALUES ('f');
SELECT * FROM like_counts ORDER BY post;
ROLLBACK;
SELECT * FROM like_counts ORDER BY post;
-- an error at the commit rolls back
BEGIN;
INSERT INTO later VALUES (repeat('long', 1000));
SELECT 'still fine';
COMMIT;
SELECT * FROM wrong('like_counts', 'post', 'later', 'key');
DROP TABLE later;
TRUNCATE like_counts;

--
-- The definition of the trigger, and what changes it
--
CREATE TABLE t (id int, key text);
CREATE TRIGGER tr AFTER INSERT OR UPDATE OR DELETE ON t
  FOR EACH ROW EXECUTE FUNCTION sb_trigger('like_counts', 'key');
-- columns that are altered, while prepared statements stay
PREPARE ins AS INSERT INTO t (key) VALUES ($1);
EXECUTE ins ('a');
ALTER TABLE t DROP id;
EXECUTE ins ('a');
ALTER TABLE t ALTER key TYPE varchar(10);
EXECUTE ins ('a');
ALTER TABLE t ADD late text, DROP key;
EXECUTE ins ('a');
INSERT INTO t VALUES ('a');
\echo :LAST_ERROR_SQLSTATE
ALTER TABLE t RENAME late TO key;
EXECUTE ins ('a');
SELECT * FROM like_counts;
-- the buffer altered, renamed, dropped and made anew
ALTER FOREIGN TABLE like_counts ALTER post TYPE varchar(3);
EXECUTE ins ('abc');
EXECUTE ins ('abcd');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM like_counts;
ALTER FOREIGN TABLE like_counts RENAME TO renamed;
EXECUTE ins ('abc');
\echo :LAST_ERROR_SQLSTATE
CREATE FOREIGN TABLE like_counts (post text NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'sb_trig.tell', interval '1h', timeout '1h');
EXECUTE ins ('new');
SELECT * FROM like_counts;
EXECUTE ins (NULL);
\echo :LAST_ERROR_SQLSTATE
SELECT sb_stop('like_counts');
EXECUTE ins ('new');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_start('like_counts');
EXECUTE ins ('new');
DROP FOREIGN TABLE renamed;
-- the buffer altered by another trigger while a statement is being counted
CREATE FUNCTION alter_buffer() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.key = 'alter' THEN
    ALTER FOREIGN TABLE like_counts ALTER post DROP NOT NULL;
  ELSIF NEW.key = 'alter back' THEN
    ALTER FOREIGN TABLE like_counts ALTER post SET NOT NULL;
  ELSIF NEW.key = 'alter more' THEN
    ALTER FOREIGN TABLE like_counts DROP n, ADD also int, ADD count bigint;
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER z_alter AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION alter_buffer();
INSERT INTO t VALUES ('alter'), (NULL), ('alter back'), ('new');
INSERT INTO t VALUES ('alter'), (NULL), ('alter back'), (NULL);
INSERT INTO t VALUES ('new'), ('alter more'), ('new');
DROP TRIGGER z_alter ON t;
SELECT * FROM like_counts ORDER BY post;
TRUNCATE like_counts;
-- The buffer's name is looked up as any name, with the present search path.
SET search_path = public;
INSERT INTO sb_trig.t VALUES ('x');
CREATE SCHEMA sb_trig2;
CREATE FOREIGN TABLE sb_trig2.like_counts (post text NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'sb_trig.tell', interval '1h', timeout '1h');
SET search_path = sb_trig2, public;
INSERT INTO sb_trig.t VALUES ('x');
SELECT * FROM like_counts;
-- With its schema, it is the same always.
DROP TRIGGER tr ON sb_trig.t;
CREATE FOREIGN TABLE sb_trig."Quoted Counts" (post text NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'sb_trig.tell', interval '1h', timeout '1h');
CREATE TRIGGER tr AFTER INSERT OR UPDATE OR DELETE ON sb_trig.t
  FOR EACH ROW EXECUTE FUNCTION sb_trigger('SB_TRIG."Quoted Counts"', 'key');
INSERT INTO sb_trig.t VALUES ('x');
SET search_path = sb_trig, public;
INSERT INTO t VALUES ('x');
SELECT * FROM "Quoted Counts";
DROP TRIGGER tr ON t;
DROP FOREIGN TABLE "Quoted Counts";
DROP SCHEMA sb_trig2 CASCADE;

--
-- Errors
--
SELECT sb_trigger();
\echo :LAST_ERROR_SQLSTATE
TRUNCATE t;
-- arguments
CREATE TRIGGER tr AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION sb_trigger();
INSERT INTO t VALUES ('x');
\echo :LAST_ERROR_SQLSTATE
CREATE OR REPLACE TRIGGER tr AFTER INSERT ON t FOR EACH ROW
  EXECUTE FUNCTION sb_trigger('like_counts');
INSERT INTO t VALUES ('x');
\echo :LAST_ERROR_SQLSTATE
CREATE OR REPLACE TRIGGER tr AFTER INSERT ON t FOR EACH ROW
  EXECUTE FUNCTION sb_trigger('like_counts', 'key', 'key');
INSERT INTO t VALUES ('x');
CREATE OR REPLACE TRIGGER tr AFTER INSERT ON t FOR EACH ROW
  EXECUTE FUNCTION sb_trigger('no_such_buffer', 'key');
INSERT INTO t VALUES ('x');
\echo :LAST_ERROR_SQLSTATE
CREATE OR REPLACE TRIGGER tr AFTER INSERT ON t FOR EACH ROW
  EXECUTE FUNCTION sb_trigger('no_such_schema.like_counts', 'key');
INSERT INTO t VALUES ('x');
CREATE OR REPLACE TRIGGER tr AFTER INSERT ON t FOR EACH ROW
  EXECUTE FUNCTION sb_trigger('', 'key');
INSERT INTO t VALUES ('x');
CREATE OR REPLACE TRIGGER tr AFTER INSERT ON t FOR EACH ROW
  EXECUTE FUNCTION sb_trigger('a.b.c.d', 'key');
INSERT INTO t VALUES ('x');
CREATE OR REPLACE TRIGGER tr AFTER INSERT ON t FOR EACH ROW
  EXECUTE FUNCTION sb_trigger('t', 'key');
INSERT INTO t VALUES ('x');
\echo :LAST_ERROR_SQLSTATE
CREATE OR REPLACE TRIGGER tr AFTER INSERT ON t FOR EACH ROW
  EXECUTE FUNCTION sb_trigger('like_counts', 'Key');
INSERT INTO t VALUES ('x');
\echo :LAST_ERROR_SQLSTATE
CREATE OR REPLACE TRIGGER tr AFTER INSERT ON t FOR EACH ROW
  EXECUTE FUNCTION sb_trigger('like_counts', '');
INSERT INTO t VALUES ('x');
CREATE OR REPLACE TRIGGER tr AFTER INSERT ON t FOR EACH ROW
  EXECUTE FUNCTION sb_trigger('like_counts', 'tableoid');
INSERT INTO t VALUES ('x');
\echo :LAST_ERROR_SQLSTATE
-- types
CREATE FOREIGN TABLE int_counts (kind int, id int, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'sb_trig.tell', interval '1h', timeout '1h');
ALTER TABLE t ADD kind int;
CREATE OR REPLACE TRIGGER tr AFTER INSERT ON t FOR EACH ROW
  EXECUTE FUNCTION sb_trigger('int_counts', 'kind', 'key');
INSERT INTO t VALUES ('1');
\echo :LAST_ERROR_SQLSTATE
DROP FOREIGN TABLE int_counts;
-- conversions that hang on a setting: what is counted up in one session would
-- be counted down under another key in the next
CREATE TABLE events (at timestamptz, amount money, utc date GENERATED ALWAYS AS ((at AT TIME ZONE 'UTC')::date) STORED);
CREATE FOREIGN TABLE by_day (day date, n bigint NOT NULL DEFAULT 1) SERVER statbuffer OPTIONS (interval '1h');
CREATE FOREIGN TABLE by_days (label text, day timestamp[], n bigint NOT NULL DEFAULT 1) SERVER statbuffer OPTIONS (interval '1h');
CREATE TRIGGER tr AFTER INSERT OR DELETE ON events FOR EACH ROW EXECUTE FUNCTION sb_trigger('by_day', 'at');
INSERT INTO events VALUES (now(), 1);
\echo :LAST_ERROR_SQLSTATE
DROP TRIGGER tr ON events;
CREATE TABLE lists (at timestamptz[], label text);
CREATE TRIGGER tr AFTER INSERT OR DELETE ON lists FOR EACH ROW EXECUTE FUNCTION sb_trigger('by_days', 'label', 'at');
INSERT INTO lists VALUES ('{now}', 'x');
CREATE TRIGGER tr AFTER INSERT OR DELETE ON events FOR EACH ROW EXECUTE FUNCTION sb_trigger('by_day', 'utc');
SET timezone = 'UTC';
INSERT INTO events VALUES ('2026-11-27 03:00 UTC', 1), ('2026-11-27 23:00 UTC', 1);
SET timezone = 'America/New_York';
DELETE FROM events WHERE at = '2026-11-27 03:00 UTC';
SELECT * FROM by_day WHERE n <> 0;
RESET timezone;
DROP TABLE events, lists;
DROP FOREIGN TABLE by_day, by_days;
-- when it is fired
CREATE OR REPLACE TRIGGER tr BEFORE INSERT ON t FOR EACH ROW
  EXECUTE FUNCTION sb_trigger('like_counts', 'key');
INSERT INTO t VALUES ('x');
\echo :LAST_ERROR_SQLSTATE
CREATE OR REPLACE TRIGGER tr BEFORE INSERT ON t FOR EACH STATEMENT
  EXECUTE FUNCTION sb_trigger('like_counts', 'key');
INSERT INTO t VALUES ('x');
CREATE VIEW v AS SELECT * FROM t;
CREATE TRIGGER tr INSTEAD OF INSERT ON v FOR EACH ROW
  EXECUTE FUNCTION sb_trigger('like_counts', 'key');
INSERT INTO v VALUES ('x');
DROP VIEW v;
-- transition tables
CREATE OR REPLACE TRIGGER tr AFTER INSERT OR UPDATE OR DELETE ON t FOR EACH STATEMENT
  EXECUTE FUNCTION sb_trigger('like_counts', 'key');
INSERT INTO t VALUES ('x');
\echo :LAST_ERROR_SQLSTATE
UPDATE t SET key = 'y';
DELETE FROM t;
DROP TRIGGER tr ON t;
CREATE TRIGGER tr AFTER UPDATE ON t REFERENCING OLD TABLE AS gone FOR EACH STATEMENT
  EXECUTE FUNCTION sb_trigger('like_counts', 'key');
UPDATE t SET key = 'y';
CREATE OR REPLACE TRIGGER tr AFTER UPDATE ON t REFERENCING NEW TABLE AS came FOR EACH STATEMENT
  EXECUTE FUNCTION sb_trigger('like_counts', 'key');
UPDATE t SET key = 'y';
DROP TRIGGER tr ON t;
-- TRUNCATE is refused, before or after, where a trigger says that it matters.
INSERT INTO t VALUES ('kept');
CREATE TRIGGER tr BEFORE TRUNCATE ON t
  EXECUTE FUNCTION sb_trigger('like_counts', 'key');
TRUNCATE t;
\echo :LAST_ERROR_SQLSTATE
CREATE OR REPLACE TRIGGER tr AFTER TRUNCATE ON t
  EXECUTE FUNCTION sb_trigger('like_counts', 'key');
TRUNCATE t;
SELECT * FROM t;
ALTER TABLE t DISABLE TRIGGER tr;
TRUNCATE t;
DROP TRIGGER tr ON t;
-- what would leave bigint's range
CREATE TRIGGER tr AFTER INSERT OR DELETE ON t
  FOR EACH ROW EXECUTE FUNCTION sb_trigger('like_counts', 'key');
BEGIN;
SELECT sb_increment('x', 9223372036854775807, 'like_counts');
INSERT INTO t VALUES ('x');
\echo :LAST_ERROR_SQLSTATE
ROLLBACK;
SELECT sb_count('x', 'like_counts');

--
-- Privileges: who changes the table counts
--
SET client_min_messages = error;
DROP ROLE IF EXISTS regress_sb_trig;
RESET client_min_messages;
CREATE ROLE regress_sb_trig;
GRANT USAGE ON SCHEMA sb_trig TO regress_sb_trig;
GRANT ALL ON t TO regress_sb_trig;
SET ROLE regress_sb_trig;
INSERT INTO t VALUES ('x');
\echo :LAST_ERROR_SQLSTATE
RESET ROLE;
GRANT INSERT ON like_counts TO regress_sb_trig;
SET ROLE regress_sb_trig;
INSERT INTO t VALUES ('x');
SELECT * FROM like_counts;
RESET ROLE;
SELECT * FROM like_counts;
-- a right that is taken away is gone with the next statement
BEGIN;
SET LOCAL ROLE regress_sb_trig;
INSERT INTO t VALUES ('x');
SET LOCAL ROLE NONE;
REVOKE INSERT ON like_counts FROM regress_sb_trig;
SET LOCAL ROLE regress_sb_trig;
INSERT INTO t VALUES ('x');
ROLLBACK;
-- who may not name the buffer, may not count in it
REVOKE USAGE ON SCHEMA sb_trig FROM regress_sb_trig;
CREATE TABLE public.sb_trig_t (key text);
GRANT ALL ON public.sb_trig_t TO regress_sb_trig;
CREATE TRIGGER tr AFTER INSERT ON public.sb_trig_t
  FOR EACH ROW EXECUTE FUNCTION sb_trigger('sb_trig.like_counts', 'key');
SET ROLE regress_sb_trig;
INSERT INTO public.sb_trig_t VALUES ('x');
\echo :LAST_ERROR_SQLSTATE
RESET ROLE;
-- Whose function changes the table counts, when it is SECURITY DEFINER.
CREATE FUNCTION public.sb_trig_add(text) RETURNS void SECURITY DEFINER LANGUAGE sql
  AS 'INSERT INTO public.sb_trig_t VALUES ($1)';
SET ROLE regress_sb_trig;
SELECT sb_trig_add('definer');
RESET ROLE;
DROP FUNCTION public.sb_trig_add;
-- A trigger function that does so itself lets others count whatever they
-- may do to the table.
CREATE FUNCTION count_as_owner() RETURNS trigger SECURITY DEFINER
  LANGUAGE c AS '$libdir/statbuffer', 'sb_trigger';
CREATE OR REPLACE TRIGGER tr AFTER INSERT ON public.sb_trig_t
  FOR EACH ROW EXECUTE FUNCTION count_as_owner('sb_trig.like_counts', 'key');
SET ROLE regress_sb_trig;
INSERT INTO public.sb_trig_t VALUES ('x'), ('definer');
RESET ROLE;
SELECT * FROM like_counts ORDER BY post;
DROP TABLE public.sb_trig_t;
DROP FUNCTION count_as_owner();

-- A buffer that another trigger alters and reads between two rows is looked
-- at anew.
CREATE FOREIGN TABLE altered (a int, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (interval '1h');
CREATE TABLE altering (id int, a int);
CREATE TRIGGER a_count AFTER INSERT ON altering
  FOR EACH ROW EXECUTE FUNCTION sb_trigger('altered', 'a');
CREATE FUNCTION alter_it() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  ALTER FOREIGN TABLE altered DROP COLUMN count,
    ADD b text, ADD c text, ADD d text, ADD e text,
    ADD f text, ADD g text, ADD h text, ADD i text, ADD count bigint;
  PERFORM count(*) FROM altered;
  RETURN NULL;
END $$;
CREATE TRIGGER b_alter AFTER INSERT ON altering
  FOR EACH ROW WHEN (NEW.id = 1) EXECUTE FUNCTION alter_it();
INSERT INTO altering VALUES (1, 10), (2, 20), (3, 30);
SELECT * FROM altered;

DROP OWNED BY regress_sb_trig;
DROP ROLE regress_sb_trig;
SET client_min_messages = error;
DROP SCHEMA sb_trig CASCADE;
