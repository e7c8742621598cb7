--
-- fdw: a buffer is a relation
--

CREATE TABLE stored (key text, total bigint);
CREATE FUNCTION store(key text, counter bigint) RETURNS void
LANGUAGE sql AS 'INSERT INTO stored VALUES (key, counter)';
CREATE FOREIGN TABLE buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');

-- Scans: filtered, sorted, limited, aggregated, with a whole row, system
-- columns, no column.
INSERT INTO buf SELECT 'k' || i, i FROM generate_series(1, 20) AS i;
SELECT * FROM buf WHERE key = 'k7';
SELECT * FROM buf WHERE count > 17 ORDER BY count DESC;
SELECT * FROM buf ORDER BY count DESC LIMIT 3;
SELECT count(*), sum(count), min(key), max(key) FROM buf;
SELECT buf FROM buf WHERE count = 5;
SELECT buf.* FROM buf WHERE key LIKE 'k1_' AND count % 5 = 0 ORDER BY key;
SELECT tableoid::regclass, key FROM buf WHERE count = 5;
SELECT count(*) FROM (SELECT FROM buf) AS no_columns;
SELECT EXISTS (SELECT FROM buf WHERE key = 'no such key');
TABLE buf ORDER BY count LIMIT 2 OFFSET 3;

-- What the transaction has counted itself comes on top.
BEGIN;
INSERT INTO buf VALUES ('k1', 1000), ('own', 5), ('k2', -2);
SELECT * FROM buf WHERE key IN ('k1', 'k2', 'own') ORDER BY key;
SELECT count(*) FROM buf;
-- a statement that counts does not see what it is about to count
INSERT INTO buf SELECT key, count FROM buf WHERE key IN ('k1', 'own');
SELECT * FROM buf WHERE key IN ('k1', 'k2', 'own') ORDER BY key;
ROLLBACK;
SELECT * FROM buf WHERE key IN ('k1', 'k2', 'own') ORDER BY key;
SELECT count(*) FROM buf;

-- Plans.  Neither EXPLAIN counts anything.
EXPLAIN (COSTS OFF) SELECT * FROM buf WHERE key = 'k1';
EXPLAIN (COSTS OFF) INSERT INTO buf VALUES ('k1', 1);
EXPLAIN (COSTS OFF) INSERT INTO buf SELECT key, count FROM buf;
EXPLAIN (COSTS OFF, VERBOSE) SELECT count, key FROM buf;
EXPLAIN (COSTS OFF) TABLE buf ORDER BY count DESC LIMIT 10;
SELECT sb_count('k1', 'buf');
-- EXPLAIN ANALYZE does, and tells how many keys a scan looked at.
CREATE FUNCTION explain_analyze(query text) RETURNS SETOF text
LANGUAGE plpgsql AS $$
DECLARE
  line text;
BEGIN
  FOR line IN EXECUTE 'EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF) ' || query LOOP
    IF line ~ 'Statbuffer|Keys' THEN
      RETURN NEXT trim(line);
    END IF;
  END LOOP;
END $$;
SELECT explain_analyze('SELECT * FROM buf WHERE count > 10');
BEGIN;
SELECT explain_analyze($$ INSERT INTO buf VALUES ('k1', 1) $$);
SELECT sb_count('k1', 'buf');
ROLLBACK;
DROP FUNCTION explain_analyze;

-- Rows cannot be changed or removed one by one, nor locked.
UPDATE buf SET count = 0;
\echo :LAST_ERROR_SQLSTATE
DELETE FROM buf;
\echo :LAST_ERROR_SQLSTATE
UPDATE buf SET count = 0 WHERE key = 'k1';
DELETE FROM buf USING (VALUES ('k1')) AS v (key) WHERE buf.key = v.key RETURNING *;
WITH changed AS (UPDATE buf SET count = count + 1 WHERE false RETURNING *) SELECT * FROM changed;
PREPARE change AS UPDATE buf SET count = count + $1 WHERE key = $2;
EXECUTE change (1, 'k1');
DEALLOCATE change;
EXPLAIN DELETE FROM buf;
-- PostgreSQL says so itself of these.
MERGE INTO buf USING (VALUES ('k1')) AS v (key) ON buf.key = v.key
  WHEN MATCHED THEN DELETE;
INSERT INTO buf VALUES ('k1', 1) ON CONFLICT (key) DO UPDATE SET count = 0;
INSERT INTO buf VALUES ('k1', 1) ON CONFLICT (key) DO NOTHING;
CREATE INDEX ON buf (key);
SELECT relname, is_insertable_into FROM information_schema.tables
  JOIN pg_class ON relname = table_name WHERE relname = 'buf';
SELECT pg_relation_is_updatable('buf', false) & 4 AS updatable,
       pg_relation_is_updatable('buf', false) & 8 AS insertable;
SELECT sum(count) FROM buf;
-- Maintenance skips it.
ANALYZE buf;
VACUUM buf;
COPY buf TO stdout;
COPY (SELECT * FROM buf WHERE count < 3 ORDER BY key) TO stdout;

-- A scan that starts over shows the same once more, whatever is counted in
-- between: each of two rows of the outer side meets the same two keys.
SET enable_hashjoin = off;
SET enable_mergejoin = off;
SET enable_material = off;
EXPLAIN (COSTS OFF)
SELECT * FROM generate_series(1, 2) AS i LEFT JOIN buf ON buf.count <= i;
SELECT i, key, count FROM generate_series(1, 3) AS i LEFT JOIN buf ON buf.count <= i
  ORDER BY i, count;
SELECT i, (SELECT string_agg(key, ' ' ORDER BY count) FROM buf WHERE count BETWEEN i AND i + 2)
  FROM generate_series(1, 3) AS i;
SELECT i, key, count, sb_async_increment(key, 100, 'buf')
  FROM generate_series(1, 2) AS i, buf WHERE count < 3
  ORDER BY i, count;
SELECT * FROM buf WHERE key IN ('k1', 'k2') ORDER BY key;
RESET enable_hashjoin;
RESET enable_mergejoin;
RESET enable_material;
-- Joins of all sorts, with itself too.
SELECT a.key, b.key FROM buf a JOIN buf b ON a.count = b.count + 1
  WHERE a.count < 6 ORDER BY a.count;
SELECT count(*) FROM buf a FULL JOIN buf b USING (key);

-- Prepared statements, with generic plans too.
PREPARE add (text, bigint) AS INSERT INTO buf VALUES ($1, $2);
PREPARE increment (text, bigint) AS SELECT sb_increment($1, $2, 'buf');
PREPARE get (text) AS SELECT * FROM buf WHERE key = $1;
PREPARE ask (text) AS SELECT sb_count($1, 'buf');
EXECUTE add ('prepared', 1);
EXECUTE increment ('prepared', 10);
EXECUTE get ('prepared');
SET plan_cache_mode = force_generic_plan;
EXECUTE add ('prepared', 100);
EXECUTE increment ('prepared', 1000);
EXECUTE get ('prepared');
EXECUTE ask ('prepared');
-- after the buffer's definition has changed
ALTER FOREIGN TABLE buf OPTIONS (SET interval '2h');
EXECUTE add ('prepared', 10000);
EXECUTE increment ('prepared', 100000);
EXECUTE ask ('prepared');
ALTER FOREIGN TABLE buf OPTIONS (ADD stopped 'true');
EXECUTE add ('prepared', 1);
EXECUTE increment ('prepared', 1);
EXECUTE ask ('prepared');
ALTER FOREIGN TABLE buf OPTIONS (DROP stopped);
-- another buffer by the same name
ALTER FOREIGN TABLE buf RENAME TO buf_old;
CREATE FOREIGN TABLE buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
EXECUTE add ('prepared', 7);
EXECUTE get ('prepared');
DROP FOREIGN TABLE buf;
EXECUTE add ('prepared', 1);
ALTER FOREIGN TABLE buf_old RENAME TO buf;
DEALLOCATE ALL;
RESET plan_cache_mode;
TRUNCATE buf;

-- A simple view counts as its buffer does, by its owner's rights.
CREATE VIEW buf_view AS SELECT count AS n, key AS word FROM buf WHERE count > 1;
INSERT INTO buf_view (word, n) VALUES ('by view', 3);
INSERT INTO buf_view VALUES (4, 'by view');
SELECT * FROM buf_view;
UPDATE buf_view SET n = 1;
DELETE FROM buf_view;
CREATE VIEW checked AS SELECT * FROM buf WHERE count > 1 WITH LOCAL CHECK OPTION;
INSERT INTO checked VALUES ('checked', 1);
INSERT INTO checked VALUES ('checked', 2);
SELECT * FROM checked ORDER BY key;
DROP VIEW buf_view, checked;

-- A trigger of its own sees each increment by INSERT; it may change or skip it.
CREATE FUNCTION fold_case() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.key = 'skip' THEN
    RETURN NULL;
  END IF;
  NEW.key := lower(NEW.key);
  RETURN NEW;
END $$;
CREATE TRIGGER fold_case BEFORE INSERT ON buf
  FOR EACH ROW EXECUTE FUNCTION fold_case();
INSERT INTO buf VALUES ('FOLDED'), ('Folded'), ('skip') RETURNING *;
CREATE FUNCTION tell_new() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE NOTICE '% % %: %', TG_WHEN, TG_OP, TG_LEVEL, NEW;
  RETURN NULL;
END $$;
CREATE TRIGGER tell_new AFTER INSERT ON buf
  FOR EACH ROW EXECUTE FUNCTION tell_new();
INSERT INTO buf VALUES ('FOLDED', 10);
SELECT * FROM buf WHERE key IN ('folded', 'skip', 'FOLDED');
DROP FUNCTION fold_case, tell_new CASCADE;
TRUNCATE buf;

-- Buffers may be partitions: each key goes to where it belongs.
CREATE TABLE parted (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  PARTITION BY RANGE (key);
CREATE FOREIGN TABLE part_a PARTITION OF parted FOR VALUES FROM ('a') TO ('m')
  SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
CREATE TABLE part_m PARTITION OF parted FOR VALUES FROM ('m') TO ('t');
-- with columns in another order, and one that was dropped
CREATE FOREIGN TABLE part_z (gone int, key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
ALTER FOREIGN TABLE part_z DROP gone;
ALTER TABLE parted ATTACH PARTITION part_z FOR VALUES FROM ('t') TO (MAXVALUE);
INSERT INTO parted VALUES ('apple', 1), ('apple', 2), ('melon', 3), ('melon', 4), ('tomato', 5);
INSERT INTO parted (key) VALUES ('tomato') RETURNING tableoid::regclass, *;
COPY parted FROM stdin;
apple	10
melon	20
tomato	30
\.
SELECT tableoid::regclass, * FROM parted ORDER BY key, count;
SELECT * FROM part_z;
INSERT INTO parted VALUES ('0', 1);
EXPLAIN (COSTS OFF) SELECT * FROM parted WHERE key = 'apple';
UPDATE parted SET count = 0 WHERE key = 'apple';
UPDATE parted SET count = 0 WHERE key = 'melon' AND count = 4;
-- moved from a table to a buffer is counted, the other way is not possible
UPDATE parted SET key = 'banana' WHERE key = 'melon' AND count = 20;
SELECT tableoid::regclass, * FROM parted ORDER BY key, count;
SELECT sb_drain('part_a'), sb_drain('part_z');
SELECT tableoid::regclass, * FROM parted ORDER BY key, count;
SELECT * FROM stored ORDER BY key;
TRUNCATE stored;
INSERT INTO parted VALUES ('apple', 1), ('tomato', 5);
TRUNCATE parted;
SELECT * FROM parted;
DROP TABLE parted;

-- Or children.
CREATE TABLE parent (key text NOT NULL, count bigint NOT NULL);
CREATE FOREIGN TABLE child () INHERITS (parent)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h');
INSERT INTO parent VALUES ('parent', 1);
INSERT INTO child VALUES ('child', 2);
SELECT tableoid::regclass, * FROM parent ORDER BY key;
DROP TABLE parent CASCADE;

-- A count column that is left out has the default of the relation that is
-- named, and a null count is none.  The hint tells where a default is missing.
CREATE FOREIGN TABLE no_default (key text NOT NULL, count bigint NOT NULL)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
INSERT INTO no_default (key) VALUES ('k');
INSERT INTO no_default VALUES ('k', NULL);
INSERT INTO buf VALUES ('k', NULL);
CREATE TABLE root (key text NOT NULL, count bigint NOT NULL) PARTITION BY LIST (key);
CREATE FOREIGN TABLE leaf PARTITION OF root (count DEFAULT 1) DEFAULT
  SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
INSERT INTO leaf (key) VALUES ('k');
INSERT INTO root (key) VALUES ('k');
ALTER TABLE ONLY root ALTER count SET DEFAULT 1;
INSERT INTO root (key) VALUES ('k');
SELECT * FROM leaf;
DROP TABLE root;
-- So it is with a buffer of another server.  IMPORT FOREIGN SCHEMA brings the
-- columns without their defaults, if it is not told otherwise.
CREATE EXTENSION postgres_fdw;
DO $$
BEGIN
  EXECUTE format('CREATE SERVER loopback FOREIGN DATA WRAPPER postgres_fdw
                  OPTIONS (host %L, port %L, dbname %L)',
                 trim(split_part(current_setting('unix_socket_directories'), ',', 1)),
                 current_setting('port'), current_database());
END $$;
CREATE USER MAPPING FOR CURRENT_USER SERVER loopback;
CREATE SCHEMA plain;
IMPORT FOREIGN SCHEMA public LIMIT TO (buf, no_default) FROM SERVER loopback INTO plain;
INSERT INTO plain.buf VALUES ('far', 2);
INSERT INTO plain.buf (key) VALUES ('far');
INSERT INTO plain.no_default (key) VALUES ('far');
CREATE SCHEMA with_default;
IMPORT FOREIGN SCHEMA public LIMIT TO (buf) FROM SERVER loopback INTO with_default
  OPTIONS (import_default 'true');
INSERT INTO with_default.buf (key) VALUES ('far');
SELECT * FROM buf WHERE key = 'far';
SELECT * FROM with_default.buf WHERE key = 'far';
SET client_min_messages = warning;
DROP SERVER loopback CASCADE;
RESET client_min_messages;
DROP EXTENSION postgres_fdw;
DROP SCHEMA plain, with_default;
DROP FOREIGN TABLE no_default;
TRUNCATE buf;

-- Columns are looked at by name, not by place.
CREATE FOREIGN TABLE wide (a int, b text, c bigint, d bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (interval '1h');
INSERT INTO wide (c, a) VALUES (3, 1);
INSERT INTO wide (d, b) VALUES (4, 'x');
SELECT * FROM wide ORDER BY d;
SELECT d, c, b, a FROM wide WHERE a IS NULL;
DROP FOREIGN TABLE wide;

-- A lot of keys, more than one block's worth, in one statement.
INSERT INTO buf SELECT md5(i::text), i FROM generate_series(1, 20000) AS i;
SELECT count(*), sum(count), bool_and(key = md5(count::text)) FROM buf;
-- Keys are only read as long as somebody asks for rows.
CREATE FUNCTION keys_copied(statement text) RETURNS int LANGUAGE plpgsql AS $$
DECLARE
  plan json;
BEGIN
  EXECUTE 'EXPLAIN (ANALYZE, FORMAT json, TIMING off) ' || statement INTO plan;
  RETURN (regexp_match(plan::text, '"Keys Copied": (\d+)'))[1];
END $$;
SELECT keys_copied('TABLE buf'), keys_copied('TABLE buf LIMIT 1') BETWEEN 1 AND 1000 AS limited;
-- Each scan of a statement begins anew, and each row is returned once.
SELECT count(*), sum(n) FROM (VALUES (1), (2)) AS v (i),
  LATERAL (SELECT count(*) AS n FROM buf WHERE count % 2 = i % 2) AS b;
SELECT count(DISTINCT b) FROM buf AS b;
SELECT count(*) FROM sb_keys('buf') WHERE count > 0;
-- What the statement itself counts, it does not see.
BEGIN;
INSERT INTO buf SELECT 'new ' || key, 1 FROM buf;
SELECT count(*), sum(count) FROM buf WHERE key LIKE 'new %';
INSERT INTO buf SELECT 'newer ' || key, 1 FROM buf;
SELECT count(*), sum(count) FROM buf;
ROLLBACK;
DROP FUNCTION keys_copied(text);
SELECT sb_drain('buf');
SELECT count(*), sum(total), bool_and(key = md5(total::text)) FROM stored;
SELECT count(*) FROM buf;

DROP FOREIGN TABLE buf;
DROP FUNCTION store(text, bigint);
DROP TABLE stored;
