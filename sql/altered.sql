--
-- altered: types, columns and rights that change between two calls of one
-- statement, or while code of users runs
--
SET statement_timeout = '2min';

CREATE TABLE stored (key text, counter bigint);

-- A row's type is altered between two rows of the same statement.
CREATE FOREIGN TABLE two (a text, b text, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (interval '1h');
CREATE TYPE pg_temp.pair AS (a text, b text);
CREATE FUNCTION pg_temp.row_after(i int, statement text) RETURNS pg_temp.pair
LANGUAGE plpgsql AS $$
DECLARE
  result pg_temp.pair;
BEGIN
  IF i = 2 THEN
    EXECUTE statement;
  END IF;
  EXECUTE 'SELECT $1, $1' INTO result USING i;
  RETURN result;
END
$$;
SELECT sb_increment(pg_temp.row_after(i, 'ALTER TYPE pg_temp.pair ALTER ATTRIBUTE b TYPE bigint'), 1, 'two')
  FROM generate_series(1, 3) i;
SELECT a, b, n FROM two ORDER BY a;
SELECT sb_count(pg_temp.row_after(i, 'ALTER TYPE pg_temp.pair ALTER ATTRIBUTE b TYPE numeric'), 'two')
  FROM generate_series(1, 3) i;
SELECT sb_increment(pg_temp.row_after(i, 'ALTER TYPE pg_temp.pair ADD ATTRIBUTE c text'), 1, 'two')
  FROM generate_series(1, 3) i;
SELECT sb_increment(pg_temp.row_after(i, 'ALTER TYPE pg_temp.pair DROP ATTRIBUTE a'), 1, 'two')
  FROM generate_series(1, 3) i;
TRUNCATE two;

-- The casts of a row's fields are those that there are at each call.
CREATE TYPE word AS ENUM ('one', 'two');
CREATE TYPE pg_temp.words AS (a word, b text);
CREATE FUNCTION word_text(word) RETURNS text LANGUAGE sql AS $$ SELECT CASE $1 WHEN 'one' THEN 'first' ELSE 'second' END $$;
CREATE FUNCTION pg_temp.cast_made(i int) RETURNS int LANGUAGE plpgsql AS $$
BEGIN
  IF i = 2 THEN
    CREATE CAST (word AS text) WITH FUNCTION word_text AS ASSIGNMENT;
  ELSIF i = 3 THEN
    DROP CAST (word AS text);
  END IF;
  RETURN i;
END
$$;
SELECT sb_increment(ROW('one'::word, pg_temp.cast_made(i)::text)::pg_temp.words, 1, 'two')
  FROM generate_series(1, 3) i;
SELECT a, b, n FROM two ORDER BY b;
DROP FUNCTION word_text(word);
DROP TYPE word CASCADE;
DROP FOREIGN TABLE two;

-- The row type of a key column stays as it is while a statement uses it, and
-- the keys that it has are read as they were meant.
CREATE TYPE place AS (city text, zip text);
CREATE FUNCTION handle_place(key place, counter bigint) RETURNS void LANGUAGE sql AS
'INSERT INTO stored VALUES (key::text, counter)';
CREATE FOREIGN TABLE places (key place, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'handle_place', interval '1h', timeout '1h');
CREATE FUNCTION execute_it() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  EXECUTE current_setting('test.statement');
END
$$;
CREATE FUNCTION place_after(int) RETURNS place LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  result place;
BEGIN
  PERFORM execute_it();
  result.city = $1;
  RETURN result;
END
$$;
CREATE CAST (int AS place) WITH FUNCTION place_after AS ASSIGNMENT;
INSERT INTO places VALUES (ROW('Bern', '3000'), 2);
BEGIN;
DECLARE c CURSOR FOR SELECT * FROM places;
FETCH c;
ALTER TYPE place DROP ATTRIBUTE zip;
ROLLBACK;
BEGIN;
DECLARE c CURSOR FOR SELECT * FROM places;
ALTER TYPE place ADD ATTRIBUTE country text;
ROLLBACK;
-- Fields that are added and dropped do not strand what is held.
ALTER TYPE place ADD ATTRIBUTE country text;
INSERT INTO places VALUES (ROW('Bern', '3000', NULL), 1), (ROW('Roma', '00118', 'Italia'), 1);
SELECT * FROM places ORDER BY 1, 2;
ALTER TYPE place DROP ATTRIBUTE zip;
ALTER TYPE place ADD ATTRIBUTE zip text;
INSERT INTO places VALUES (ROW('Bern', NULL, NULL), 4);
SELECT * FROM places ORDER BY 1, 2;
SELECT key, count FROM sb_keys('places') ORDER BY 1, 2;
BEGIN;
INSERT INTO places VALUES (ROW('Bern', NULL, NULL), 8);
SELECT * FROM places ORDER BY 1, 2;
ROLLBACK;
SELECT sb_drain('places');
SELECT * FROM stored ORDER BY 1;
TRUNCATE stored;
-- The same within an array, and with a field that is a row itself.
CREATE TYPE way AS (a place, b place);
CREATE FUNCTION handle_way(way place[], w way, counter bigint) RETURNS void LANGUAGE sql AS
$$ INSERT INTO stored VALUES (concat(way, w), counter) $$;
CREATE FOREIGN TABLE ways (way place[], w way, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'handle_way', interval '1h', timeout '1h');
INSERT INTO ways VALUES (ARRAY[ROW('Bern', 'CH', 'z')::place, NULL], ROW(ROW('Roma', 'I', 'z'), NULL));
ALTER TYPE place DROP ATTRIBUTE country;
ALTER TYPE place ADD ATTRIBUTE country text;
INSERT INTO ways VALUES (ARRAY[ROW('Bern', 'z', NULL)::place, NULL], ROW(ROW('Roma', 'z', NULL), NULL)),
  (ARRAY[ROW('Bern', 'z', 'CH')::place], NULL);
SELECT * FROM ways ORDER BY n, w;
SELECT sb_drain('ways');
SELECT * FROM stored ORDER BY 1;
TRUNCATE stored;
DROP FOREIGN TABLE ways;
DROP FUNCTION handle_way(place[], way, bigint);
DROP TYPE way;

-- A type that is altered by code that a call of ours runs.
SET test.statement = 'ALTER TYPE place ADD ATTRIBUTE planet text';
SELECT sb_increment(1, 1, 'places');
CREATE TABLE visits (city int);
CREATE TRIGGER count_visits AFTER INSERT ON visits FOR EACH ROW EXECUTE FUNCTION sb_trigger('places', 'city');
INSERT INTO visits VALUES (1);
SET test.statement = 'DROP TYPE place CASCADE';
SELECT sb_increment(1, 1, 'places');
INSERT INTO visits VALUES (1);
-- A mere rename is let through, and nothing is mistaken for something else.
SET test.statement = 'ALTER FOREIGN TABLE places RENAME COLUMN key TO renamed';
SELECT sb_increment(1, 1, 'places');
SET test.statement = 'ALTER FOREIGN TABLE places RENAME COLUMN renamed TO key';
INSERT INTO visits VALUES (1), (2);
SET test.statement = 'SELECT 1';
INSERT INTO visits VALUES (1), (2);
SELECT * FROM places ORDER BY 1;
-- What is in use can lose a column all the same, with the column's type.
CREATE FUNCTION drop_type(text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  DROP DOMAIN IF EXISTS going CASCADE;
  RETURN true;
END
$$;
CREATE DOMAIN dropping AS text CHECK (drop_type(VALUE));
CREATE DOMAIN going AS text;
CREATE FOREIGN TABLE fragile (a going, b dropping, c text, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (interval '1h');
SET client_min_messages = warning;
SELECT sb_increment(ROW('a', 'b', 'c'), 1, 'fragile');
SELECT sb_async_increment(ROW('a', 'b', 'c'), 1, 'fragile');
SELECT sb_count(ROW('a', 'b', 'c'), 'fragile');
SELECT sb_count(ROW('b', 'c'), 'fragile');
RESET client_min_messages;
SELECT * FROM fragile;
DROP FOREIGN TABLE fragile;
DROP DOMAIN dropping;
DROP FUNCTION drop_type(text);
DROP TABLE visits;

-- A handler that renames the columns it is called for, and one that alters the
-- type of its keys.
CREATE FUNCTION rename_column() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'renamed'::regclass AND attname = 'a') THEN
    ALTER FOREIGN TABLE renamed RENAME COLUMN a TO z;
  ELSE
    ALTER FOREIGN TABLE renamed RENAME COLUMN z TO a;
  END IF;
END
$$;
CREATE FUNCTION store_renaming(a text, b place, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  PERFORM rename_column();
  -- its definition is read again
  PERFORM sb_count(ROW('none', NULL), 'renamed');
  INSERT INTO stored VALUES (a || b::text, counter);
END
$$;
CREATE FOREIGN TABLE renamed (a text, b place, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store_renaming', interval '1h');
INSERT INTO renamed SELECT 'key ' || i, ROW(i::text, 'z', NULL)::place, i FROM generate_series(1, 5) i;
SELECT sb_drain('renamed');
SELECT * FROM stored ORDER BY 1;
TRUNCATE stored;
CREATE OR REPLACE FUNCTION rename_column() RETURNS void LANGUAGE sql AS
'ALTER TYPE place DROP ATTRIBUTE country';
INSERT INTO renamed SELECT 'key', ROW('Bern', 'z', NULL)::place;
-- whether a drain still sees it fail, and warns, is a matter of time
SET client_min_messages = error;
DO $$
BEGIN
  FOR i IN 1 .. 1200 LOOP
    EXIT WHEN (SELECT failures > 0 FROM sb_stat_buffers WHERE buffer = 'renamed');
    PERFORM sb_drain('renamed', '100ms');
    COMMIT;
  END LOOP;
END
$$;
RESET client_min_messages;
SELECT last_error FROM sb_stat_buffers WHERE buffer = 'renamed';
DROP FOREIGN TABLE renamed;
DROP FUNCTION store_renaming(text, place, bigint);
DROP FUNCTION rename_column();

-- However often a row type is altered between increments, the buffer goes on
-- when its keys are flushed.
DO $$
BEGIN
  FOR i IN 1 .. 100 LOOP
    FOR attempt IN 1 .. 1000 LOOP
      BEGIN
        PERFORM sb_async_increment(i::place, 1, 'places');
        EXIT;
      EXCEPTION WHEN program_limit_exceeded THEN
        PERFORM pg_sleep(0.01);
      END;
      COMMIT;
      PERFORM sb_drain('places');
      COMMIT;
    END LOOP;
    EXECUTE 'ALTER TYPE place ADD ATTRIBUTE a' || i || ' int';
    COMMIT;
  END LOOP;
END
$$;
SELECT sb_drain('places');
SELECT count(*), sum(counter) FROM stored WHERE key LIKE '(%,%';
DROP FOREIGN TABLE places;
DROP TYPE place CASCADE;
DROP FUNCTION execute_it();

-- A type that consists of a great many fields, in a few row types, costs no
-- more than these.
DO $$
BEGIN
  EXECUTE 'CREATE TYPE nested0 AS (a int, b int)';
  FOR i IN 1 .. 12 LOOP
    EXECUTE format('CREATE TYPE nested%s AS (a nested%s, b nested%s)', i, i - 1, i - 1);
  END LOOP;
END
$$;
CREATE FOREIGN TABLE deep (key nested12, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (interval '1h');
SET statement_timeout = '10s';
INSERT INTO deep VALUES (NULL), (ROW(NULL, NULL));
SELECT * FROM deep ORDER BY 1;
SELECT sum(total_bytes) < 100000 AS small FROM pg_backend_memory_contexts WHERE name = 'statbuffer shape';
SET statement_timeout = '2min';
DROP FOREIGN TABLE deep;
-- Types of more fields than any key could have are refused.
DO $$
BEGIN
  FOR i IN 1 .. 5 LOOP
    EXECUTE (SELECT format('CREATE TYPE wide%s AS (%s)', i, string_agg('c' || c || ' int', ',')) FROM generate_series(1, 1000) c);
  END LOOP;
END
$$;
CREATE FOREIGN TABLE wide (key wide1, n bigint NOT NULL DEFAULT 1) SERVER statbuffer OPTIONS (interval '1h');
INSERT INTO wide VALUES (NULL);
SELECT * FROM wide;
ALTER TYPE wide1 ADD ATTRIBUTE w2 wide2, ADD ATTRIBUTE w3 wide3, ADD ATTRIBUTE w4 wide4, ADD ATTRIBUTE w5 wide5;
INSERT INTO wide VALUES (NULL);
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM wide;
ALTER TYPE wide1 DROP ATTRIBUTE w5;
SELECT * FROM wide;
DROP FOREIGN TABLE wide;
SET client_min_messages = warning;
DROP TYPE nested0, wide1, wide2, wide3, wide4, wide5 CASCADE;
DO $$ BEGIN FOR i IN 1 .. 12 LOOP EXECUTE 'DROP TYPE nested' || i || ' CASCADE'; END LOOP; END $$;
RESET client_min_messages;

-- A right that is revoked is gone with the next call, also in the midst of a
-- statement.
CREATE FOREIGN TABLE buf (key text NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (interval '1h');
CREATE ROLE regress_a;
CREATE ROLE regress_b IN ROLE regress_a;
GRANT INSERT ON buf TO regress_a;
CREATE TABLE trigged (key text);
CREATE TRIGGER t AFTER INSERT ON trigged FOR EACH ROW EXECUTE FUNCTION sb_trigger('buf', 'key');
GRANT INSERT ON trigged TO regress_b;
-- As whoever may: in a statement of its own, or in that of somebody else.
CREATE FUNCTION run(statement text) RETURNS text LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
  EXECUTE statement;
  RETURN 'k';
END
$$;
SET ROLE regress_b;
BEGIN;
DECLARE c CURSOR FOR SELECT sb_increment('k', i, 'buf') FROM generate_series(1, 100) i;
FETCH 2 c;
SELECT run('REVOKE INSERT ON buf FROM regress_a');
FETCH c;
\echo :LAST_ERROR_SQLSTATE
ROLLBACK;
SELECT sb_increment(CASE i WHEN 3 THEN run('REVOKE regress_a FROM regress_b') ELSE 'k' END, i, 'buf')
  FROM generate_series(1, 5) i;
SELECT sb_async_increment(CASE i WHEN 3 THEN run('REVOKE regress_a FROM regress_b') ELSE 'k' END, i, 'buf')
  FROM generate_series(1, 5) i;
INSERT INTO trigged VALUES ('k'), (run('REVOKE INSERT ON buf FROM regress_a'));
DO $$
DECLARE
  r record;
BEGIN
  FOR r IN SELECT sb_increment('k', i, 'buf') FROM generate_series(1, 100) i LOOP
    PERFORM run('REVOKE regress_a FROM regress_b');
  END LOOP;
END
$$;
RESET ROLE;
-- What was counted outside of the transaction, before.
SELECT * FROM buf;

-- Reading takes no lock that only those who may write can take.
BEGIN;
SELECT sb_count('k', 'buf');
SELECT * FROM buf;
SELECT count(*) FROM sb_keys('buf');
SELECT DISTINCT mode FROM pg_locks WHERE relation = 'buf'::regclass AND pid = pg_backend_pid();
COMMIT;

DROP TABLE trigged;
DROP FOREIGN TABLE buf;
DROP FUNCTION run(text);
DROP ROLE regress_a, regress_b;

-- A handler that cancels itself fails like any other.
CREATE FUNCTION handle_cancel(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_cancel_backend(pg_backend_pid());
  PERFORM pg_sleep(60);
END
$$;
CREATE FOREIGN TABLE cancelling (key text NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'handle_cancel', interval '0', backoff '10ms');
INSERT INTO cancelling VALUES ('k');
DO $$
BEGIN
  FOR i IN 1 .. 1200 LOOP
    EXIT WHEN (SELECT failures > 0 FROM sb_stat_buffers WHERE buffer = 'cancelling');
    COMMIT;
    PERFORM pg_sleep(0.1);
  END LOOP;
END
$$;
SELECT state, failures > 0 AS failed, last_error FROM sb_stat_buffers WHERE buffer = 'cancelling';
DROP FOREIGN TABLE cancelling;
DROP FUNCTION handle_cancel(text, bigint);
DROP TABLE stored;
