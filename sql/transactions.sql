--
-- transactions: increments share their transaction's fate
--

CREATE TABLE stored (key text PRIMARY KEY, total bigint NOT NULL);
CREATE FUNCTION store(key text, counter bigint) RETURNS void
LANGUAGE sql AS $$
  INSERT INTO stored VALUES (key, counter)
  ON CONFLICT (key) DO UPDATE SET total = stored.total + EXCLUDED.total
$$;
CREATE FOREIGN TABLE buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
\pset footer off

--
-- COMMIT and ROLLBACK
--
BEGIN;
SELECT sb_increment('commit', 1, 'buf');
INSERT INTO buf VALUES ('commit', 10);
-- A transaction sees what it has counted itself.
SELECT sb_count('commit', 'buf');
SELECT * FROM buf;
COMMIT;
SELECT sb_count('commit', 'buf');

BEGIN;
SELECT sb_increment('commit', 100, 'buf');
SELECT sb_increment('rollback', 100, 'buf');
INSERT INTO buf VALUES ('rollback', 1000);
SELECT sb_count('commit', 'buf') AS commit, sb_count('rollback', 'buf') AS rollback;
ROLLBACK;
SELECT sb_count('commit', 'buf') AS commit, sb_count('rollback', 'buf') AS rollback;
SELECT * FROM buf;

-- An error makes the rest of the transaction an error, and undoes all of it.
BEGIN;
SELECT sb_increment('commit', 100, 'buf');
SELECT 1 / 0;
SELECT sb_increment('commit', 100, 'buf');
COMMIT;
SELECT sb_count('commit', 'buf');

-- Outside of a transaction block each statement is one.
SELECT sb_increment('commit', 100, 'buf'), 1 / (random() * 0)::int;
SELECT sb_count('commit', 'buf');
-- Several statements sent at once are one, too.
SELECT sb_increment('commit', 100, 'buf') \; SELECT 1 / 0;
SELECT sb_count('commit', 'buf');
SELECT sb_increment('commit', 100, 'buf') \; SELECT sb_count('commit', 'buf');
SELECT sb_count('commit', 'buf');

-- An error in the middle of a statement that counts.
SELECT sb_increment('middle', 1, 'buf'), 1 / (3 - i) FROM generate_series(1, 5) AS i;
INSERT INTO buf SELECT 'middle', 1 / (3 - i) FROM generate_series(1, 5) AS i;
INSERT INTO buf SELECT CASE WHEN i < 4 THEN 'middle' END, 1 FROM generate_series(1, 5) AS i;
SELECT sb_count('middle', 'buf');
-- In a block, what came before it goes as well.
BEGIN;
SELECT sb_increment('middle', 1, 'buf');
SAVEPOINT s;
INSERT INTO buf SELECT 'middle', 1 / (3 - i) FROM generate_series(1, 5) AS i;
ROLLBACK TO s;
SELECT sb_count('middle', 'buf');
COMMIT;
SELECT sb_count('middle', 'buf');

-- What adds up to nothing in a transaction does nothing.
BEGIN;
SELECT sb_increment('nothing', 5, 'buf');
SELECT sb_increment('nothing', -5, 'buf');
COMMIT;
SELECT sb_count('nothing', 'buf');
SELECT count(*) FROM buf WHERE key = 'nothing';

-- COMMIT AND CHAIN
BEGIN;
SELECT sb_increment('chain', 1, 'buf');
COMMIT AND CHAIN;
SELECT sb_increment('chain', 10, 'buf');
ROLLBACK AND CHAIN;
SELECT sb_increment('chain', 100, 'buf');
COMMIT;
SELECT sb_count('chain', 'buf');

TRUNCATE buf;

--
-- Savepoints
--
BEGIN;
SELECT sb_increment('k', 1, 'buf');
SAVEPOINT a;
SELECT sb_increment('k', 10, 'buf');
SELECT sb_increment('only in a', 10, 'buf');
SAVEPOINT b;
SELECT sb_increment('k', 100, 'buf');
-- 111
SELECT sb_count('k', 'buf');
ROLLBACK TO b;
-- 11, and again with 1000 more
SELECT sb_count('k', 'buf');
SELECT sb_increment('k', 1000, 'buf');
SELECT sb_count('k', 'buf');
RELEASE b;
SELECT sb_count('k', 'buf');
ROLLBACK TO a;
-- 1: what b's release gave to a is gone with a
SELECT sb_count('k', 'buf') AS k, sb_count('only in a', 'buf') AS only_in_a;
SELECT * FROM buf;
SELECT sb_increment('k', 10000, 'buf');
RELEASE a;
SELECT sb_count('k', 'buf');
COMMIT;
SELECT * FROM buf;

-- Rolled back to twice, with the same name twice, released from the outside.
BEGIN;
SAVEPOINT s;
SELECT sb_increment('twice', 1, 'buf');
ROLLBACK TO s;
SELECT sb_increment('twice', 10, 'buf');
ROLLBACK TO s;
SELECT sb_increment('twice', 100, 'buf');
SAVEPOINT s;
SELECT sb_increment('twice', 1000, 'buf');
SAVEPOINT s;
SELECT sb_increment('twice', 10000, 'buf');
ROLLBACK TO s;
RELEASE s;
SAVEPOINT t;
SELECT sb_increment('twice', 100000, 'buf');
SAVEPOINT u;
SELECT sb_increment('twice', 1000000, 'buf');
RELEASE t;
SELECT sb_count('twice', 'buf');
COMMIT;
-- 100 + 1000 + 100000 + 1000000
SELECT sb_count('twice', 'buf');

-- Only in the subtransaction, and in one that is rolled back after an error.
BEGIN;
SAVEPOINT s;
SELECT sb_increment('only', 1, 'buf');
RELEASE s;
SAVEPOINT s;
SELECT sb_increment('only', 10, 'buf');
SELECT sb_increment('only', 1 / 0, 'buf');
ROLLBACK TO s;
SELECT sb_increment('only', 100, 'buf');
COMMIT;
SELECT sb_count('only', 'buf');

-- The whole of it rolled back, with savepoints released and not.
BEGIN;
SELECT sb_increment('all', 1, 'buf');
SAVEPOINT a;
SELECT sb_increment('all', 1, 'buf');
RELEASE a;
SAVEPOINT b;
SELECT sb_increment('all', 1, 'buf');
ROLLBACK;
SELECT sb_count('all', 'buf');

-- Many keys and many levels: those that are rolled back are the odd ones.
BEGIN;
SELECT sum(1) FROM (SELECT sb_increment('many' || i, 1, 'buf') FROM generate_series(1, 100) AS i) AS x;
SAVEPOINT a;
SELECT sum(1) FROM (SELECT sb_increment('many' || i, 10, 'buf') FROM generate_series(51, 150) AS i) AS x;
SAVEPOINT b;
SELECT sum(1) FROM (SELECT sb_increment('many' || i, 100, 'buf') FROM generate_series(101, 200) AS i) AS x;
RELEASE b;
SAVEPOINT c;
SELECT sum(1) FROM (SELECT sb_increment('many' || i, 1000, 'buf') FROM generate_series(1, 200) AS i) AS x;
ROLLBACK TO c;
SELECT count, count(*) AS keys FROM buf WHERE key LIKE 'many%' GROUP BY 1 ORDER BY 1;
COMMIT;
SELECT count, count(*) AS keys FROM buf WHERE key LIKE 'many%' GROUP BY 1 ORDER BY 1;

TRUNCATE buf;

-- Savepoints that nobody releases.  Each counts a key of its own, one that all
-- count, and one that all from the 401st on count.
BEGIN;
\set ECHO none
\o /dev/null
SELECT format('SAVEPOINT s%s', i),
       format('SELECT sb_increment(key, %s, ''buf'') FROM unnest(ARRAY[''own %s'', ''all''%s]) AS key',
              i, i, CASE WHEN i > 400 THEN ', ''late''' END)
  FROM generate_series(1, 1000) AS i ORDER BY i \gexec
\o
\set ECHO all
SELECT count(*) AS keys, sum(count) FROM buf;
SELECT * FROM buf WHERE key IN ('all', 'late', 'own 1000') ORDER BY key;
ROLLBACK TO s501;
-- the sums of 1 to 500, and of 401 to 500
SELECT * FROM buf WHERE key IN ('all', 'late', 'own 500', 'own 501') ORDER BY key;
SELECT sb_increment('late', 1000000, 'buf');
RELEASE s450;
SELECT sb_count('late', 'buf');
ROLLBACK TO s449;
-- the sums of 1 to 448, and of 401 to 448
SELECT * FROM buf WHERE key IN ('all', 'late') ORDER BY key;
SELECT sb_increment('late', 2000000, 'buf');
COMMIT;
SELECT * FROM buf WHERE key IN ('all', 'late', 'own 448', 'own 449') ORDER BY key;
SELECT count(*) AS keys, sum(count) FROM buf WHERE key LIKE 'own %';

TRUNCATE buf;

-- Released and not, rolled back and counted on, at random: a table in which
-- the same is written has the same in the end, and whenever one looks.
CREATE TABLE ledger (key text, n bigint);
CREATE FUNCTION count_some(x int) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  word text;
BEGIN
  FOR i IN 1..1 + x % 7 LOOP
    word := 'key ' || (x * i) % 31;
    INSERT INTO ledger VALUES (word, i);
    PERFORM sb_increment(word, i, 'buf');
    CONTINUE WHEN i % 3 > 0;
    BEGIN
      INSERT INTO ledger VALUES (word, 100);
      PERFORM sb_increment(word, 100, 'buf');
      IF x % 2 = 1 THEN
        RAISE 'odd';
      END IF;
    EXCEPTION WHEN raise_exception THEN
      INSERT INTO ledger VALUES ('caught', 1);
      PERFORM sb_increment('caught', 1, 'buf');
    END;
  END LOOP;
END $$;
CREATE FUNCTION check_counts() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF EXISTS (SELECT FROM (SELECT key, sum(n) AS n FROM ledger GROUP BY key) AS l
               FULL JOIN buf USING (key) WHERE n IS DISTINCT FROM count) THEN
    RAISE 'the buffer has other counts than the ledger';
  END IF;
END $$;
CREATE FUNCTION random_walk(seed bigint, steps int) RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
  x bigint := seed;
  depth int := 0;
  action int;
BEGIN
  FOR i IN 1..steps LOOP
    x := (x * 1103515245 + 12345) % 2147483648;
    action := x / 65536 % 1000;
    IF action < 400 THEN
      RETURN NEXT format('SELECT count_some(%s)', x / 65536 % 1000);
    ELSIF action < 700 OR depth = 0 THEN
      depth := depth + 1;
      RETURN NEXT 'SAVEPOINT s' || depth;
    ELSIF action < 800 THEN
      depth := depth - least(depth - 1, x / 8388608 % 4);
      RETURN NEXT 'ROLLBACK TO s' || depth;
    ELSIF action < 900 THEN
      depth := depth - least(depth - 1, x / 8388608 % 3);
      RETURN NEXT 'RELEASE s' || depth;
      depth := depth - 1;
    ELSIF action < 997 THEN
      RETURN NEXT 'SELECT check_counts()';
    ELSE
      RETURN NEXT 'TRUNCATE buf';
      RETURN NEXT 'DELETE FROM ledger';
    END IF;
  END LOOP;
  RAISE NOTICE '% savepoints are open', depth;
END $$;
\set ECHO none
\o /dev/null
BEGIN;
SELECT random_walk(1, 1500) \gexec
COMMIT;
SELECT check_counts();
BEGIN;
SELECT random_walk(2, 500) \gexec
ROLLBACK;
SELECT check_counts();
BEGIN;
SELECT random_walk(3, 1500) \gexec
COMMIT;
\o
\set ECHO all
SELECT check_counts();
SELECT count(*) > 20 AS many_keys, sum(count) > 1000 AS much FROM buf;
DROP TABLE ledger;
DROP FUNCTION count_some, check_counts, random_walk;

TRUNCATE buf;

--
-- PL/pgSQL: an exception that is caught undoes its block
--
CREATE FUNCTION count_down(level int) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  PERFORM sb_increment('level ' || level, 1, 'buf');
  BEGIN
    PERFORM sb_increment('inner', 1, 'buf');
    IF level > 0 THEN
      PERFORM count_down(level - 1);
    END IF;
    -- every second one fails, and takes along what it called
    IF level % 2 = 1 THEN
      RAISE 'odd';
    END IF;
  EXCEPTION WHEN raise_exception THEN
    PERFORM sb_increment('caught', 1, 'buf');
  END;
END $$;
-- 4 counts itself and its inner block, in which 3 counts itself and fails.
SELECT count_down(4);
SELECT * FROM buf ORDER BY key;
-- The same without a transaction around it that would be its own.
BEGIN;
SELECT count_down(2);
SELECT * FROM buf ORDER BY key;
ROLLBACK;
SELECT * FROM buf ORDER BY key;

-- An error of the increment itself can be caught as well.
DO $$
BEGIN
  PERFORM sb_increment('before', 1, 'buf');
  BEGIN
    PERFORM sb_increment('within', 1, 'buf');
    PERFORM sb_increment(NULL, 1, 'buf');
  EXCEPTION WHEN not_null_violation THEN
    PERFORM sb_increment('after', 1, 'buf');
  END;
END $$;
SELECT * FROM buf WHERE key IN ('before', 'within', 'after') ORDER BY key;

-- A loop with an exception block in each turn.
DO $$
BEGIN
  FOR i IN 1..300 LOOP
    BEGIN
      PERFORM sb_increment('loop', 1, 'buf');
      PERFORM 1 / (i % 3);
    EXCEPTION WHEN division_by_zero THEN
      PERFORM sb_increment('loop failed', 1, 'buf');
    END;
  END LOOP;
END $$;
SELECT * FROM buf WHERE key LIKE 'loop%' ORDER BY key;
-- The same within another block, which fails or does not.
DO $$
BEGIN
  PERFORM sb_increment('nested', 1, 'buf');
  FOR turn IN 1..3 LOOP
    BEGIN
      PERFORM sb_increment('nested ' || i, 10, 'buf') FROM generate_series(0, 6) AS i;
      FOR i IN 1..700 LOOP
        BEGIN
          PERFORM sb_increment('nested', 100, 'buf');
          PERFORM sb_increment('nested ' || i % 7, 1, 'buf');
          PERFORM 1 / (i % 10);
        EXCEPTION WHEN division_by_zero THEN
          PERFORM sb_increment('nested failed', 1, 'buf');
        END;
      END LOOP;
      IF turn = 2 THEN
        RAISE 'all in vain';
      END IF;
    EXCEPTION WHEN raise_exception THEN
      PERFORM sb_increment('nested caught', 1, 'buf');
    END;
  END LOOP;
END $$;
SELECT * FROM buf WHERE key LIKE 'nested%' ORDER BY key;

TRUNCATE buf;

--
-- Procedures that end transactions
--
CREATE PROCEDURE count_in_steps(n int) LANGUAGE plpgsql AS $$
BEGIN
  FOR i IN 1..n LOOP
    PERFORM sb_increment('step', 1, 'buf');
    INSERT INTO buf VALUES ('inserted');
    IF i % 3 = 0 THEN
      ROLLBACK;
    ELSE
      COMMIT;
    END IF;
  END LOOP;
END $$;
CALL count_in_steps(9);
SELECT * FROM buf ORDER BY key;
-- An error ends what comes after the last COMMIT.
DO $$
BEGIN
  PERFORM sb_increment('done', 1, 'buf');
  COMMIT;
  PERFORM sb_increment('done', 1, 'buf');
  PERFORM sb_increment('done', 1, NULL::regclass);
END $$;
SELECT sb_count('done', 'buf');
-- What is counted while a cursor goes on is there with each COMMIT.
DO $$
DECLARE
  r record;
BEGIN
  FOR r IN SELECT * FROM buf ORDER BY key LOOP
    PERFORM sb_increment(r.key, r.count, 'buf');
    COMMIT;
  END LOOP;
END $$;
SELECT * FROM buf ORDER BY key;

TRUNCATE buf;

--
-- A read-only transaction may count, but not by INSERT, which is PostgreSQL's
-- own rule.
--
BEGIN READ ONLY;
SELECT sb_increment('read only', 1, 'buf');
SELECT sb_async_increment('read only', 10, 'buf');
SELECT sb_count('read only', 'buf');
COMMIT;
SELECT sb_count('read only', 'buf');
BEGIN READ ONLY;
INSERT INTO buf VALUES ('read only', 1);
ROLLBACK;

-- Whatever the isolation level, the counts are the live ones.
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT sb_count('read only', 'buf');
SELECT sb_increment('read only', 1, 'buf');
SELECT sb_async_increment('read only', 1, 'buf');
SELECT sb_count('read only', 'buf');
COMMIT;
SELECT sb_count('read only', 'buf');

--
-- sb_async_increment: at once, and it stays
--
BEGIN;
SELECT sb_async_increment('async', 1, 'buf');
SELECT sb_increment('async', 10, 'buf');
SELECT sb_count('async', 'buf');
SELECT key, count FROM sb_keys('buf') WHERE key = 'async';
SAVEPOINT s;
SELECT sb_async_increment('async', 100, 'buf');
ROLLBACK TO s;
SELECT sb_count('async', 'buf');
ROLLBACK;
SELECT sb_count('async', 'buf');
SELECT sb_async_increment('async', 1000, 'buf'), 1 / (random() * 0)::int;
SELECT sb_count('async', 'buf');
DO $$
BEGIN
  PERFORM sb_async_increment('async', 10000, 'buf');
  RAISE 'no';
EXCEPTION WHEN raise_exception THEN
  NULL;
END $$;
SELECT sb_count('async', 'buf');
-- Another one's key it makes, too, where the transaction has one pending.
BEGIN;
SELECT sb_increment('both', 1, 'buf');
SELECT sb_async_increment('both', 2, 'buf');
SELECT sb_count('both', 'buf');
ROLLBACK;
SELECT sb_count('both', 'buf');

--
-- The end of the transaction is late enough for all that runs at its end
--
CREATE TABLE words (word text);
CREATE FUNCTION count_word() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM sb_increment(NEW.word, buffer => 'buf');
  RETURN NULL;
END $$;
CREATE TRIGGER count_word AFTER INSERT ON words
  FOR EACH ROW EXECUTE FUNCTION count_word();
INSERT INTO words VALUES ('trigger'), ('trigger'), ('trigger');
BEGIN;
INSERT INTO words VALUES ('trigger');
ROLLBACK;
INSERT INTO words VALUES ('trigger'), (NULL);
COPY words FROM stdin;
trigger
trigger
\.
SELECT sb_count('trigger', 'buf');

CREATE CONSTRAINT TRIGGER count_late AFTER INSERT ON words
  DEFERRABLE INITIALLY DEFERRED
  FOR EACH ROW EXECUTE FUNCTION count_word();
BEGIN;
INSERT INTO words VALUES ('late');
-- only the first trigger
SELECT sb_count('late', 'buf');
COMMIT;
SELECT sb_count('late', 'buf');
DROP TABLE words;
DROP FUNCTION count_word;

-- A cursor that outlives its transaction runs to its end there.
BEGIN;
DECLARE c CURSOR WITH HOLD FOR
  SELECT i, sb_increment('hold', 1, 'buf') FROM generate_series(1, 7) AS i;
FETCH 2 FROM c;
SELECT sb_count('hold', 'buf');
COMMIT;
SELECT sb_count('hold', 'buf');
CLOSE c;

--
-- COPY, INSERT ... SELECT, RETURNING, WITH
--
COPY buf FROM stdin;
copied	1
copied	2
more	\N
\.
COPY buf FROM stdin;
copied	1
copied	2
more	3
\.
COPY buf (key) FROM stdin;
copied
more
\.
INSERT INTO buf SELECT 'selected', i FROM generate_series(1, 10) AS i;
INSERT INTO buf SELECT key || '!', count FROM buf WHERE key = 'copied';
INSERT INTO buf VALUES ('returned', 5), ('returned', 6) RETURNING *;
INSERT INTO buf VALUES ('returned') RETURNING key, count * 10 AS tenfold;
WITH counted AS (
  INSERT INTO buf SELECT 'with', 3 FROM generate_series(1, 2) RETURNING count
) SELECT sum(count) FROM counted;
INSERT INTO buf VALUES ('conflict') ON CONFLICT DO NOTHING;
SELECT * FROM buf WHERE key ~ '^(copied|more|selected|returned|with|conflict)' ORDER BY key;
SELECT sb_drain('buf');
SELECT * FROM stored WHERE key ~ '^(copied|more|selected|returned|with|conflict)' ORDER BY key;

--
-- PREPARE TRANSACTION
--
BEGIN;
SELECT sb_increment('prepared', 1, 'buf');
PREPARE TRANSACTION 'regress_statbuffer';
\echo :LAST_ERROR_SQLSTATE
SELECT sb_count('prepared', 'buf');
BEGIN;
INSERT INTO buf VALUES ('prepared', 1);
PREPARE TRANSACTION 'regress_statbuffer';
BEGIN;
TRUNCATE buf;
PREPARE TRANSACTION 'regress_statbuffer';
SELECT sb_count('prepared', 'buf');
SELECT gid FROM pg_prepared_xacts;

--
-- TRUNCATE discards, when it is committed
--
TRUNCATE buf;
SELECT sb_increment('k', 5, 'buf');
BEGIN;
SELECT sb_increment('k', 10, 'buf');
TRUNCATE buf;
SELECT sb_count('k', 'buf');
SELECT * FROM buf;
ROLLBACK;
SELECT sb_count('k', 'buf');
BEGIN;
SELECT sb_increment('k', 10, 'buf');
TRUNCATE buf;
SELECT sb_increment('k', 100, 'buf');
SELECT sb_increment('new', 200, 'buf');
SELECT sb_count('k', 'buf') AS k, sb_count('new', 'buf') AS new;
SELECT * FROM buf ORDER BY key;
COMMIT;
SELECT * FROM buf ORDER BY key;
-- with savepoints
BEGIN;
SELECT sb_increment('k', 1, 'buf');
SAVEPOINT s;
SELECT sb_increment('k', 10, 'buf');
TRUNCATE buf;
SELECT sb_increment('k', 1000, 'buf');
SELECT sb_count('k', 'buf');
ROLLBACK TO s;
-- 100 from before, and 1
SELECT sb_count('k', 'buf');
SAVEPOINT t;
TRUNCATE buf;
RELEASE t;
SELECT sb_count('k', 'buf') AS k, sb_count('new', 'buf') AS new;
SELECT sb_increment('k', 7, 'buf');
COMMIT;
SELECT * FROM buf ORDER BY key;
BEGIN;
TRUNCATE buf;
SAVEPOINT s;
TRUNCATE buf;
SELECT sb_increment('k', 8, 'buf');
ROLLBACK TO s;
SELECT * FROM buf;
COMMIT;
SELECT * FROM buf;
-- It can be counted on after it, and the discarded never reaches the handler.
TRUNCATE stored;
SELECT sb_increment('k', 3, 'buf');
TRUNCATE buf;
SELECT sb_increment('k', 4, 'buf');
SELECT sb_drain('buf');
SELECT * FROM stored;
-- several at once, with an ordinary table
CREATE FOREIGN TABLE buf2 (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
INSERT INTO buf VALUES ('k');
INSERT INTO buf2 VALUES ('k');
TRUNCATE buf, stored, buf2;
SELECT (SELECT count(*) FROM buf) AS buf, (SELECT count(*) FROM buf2) AS buf2,
       (SELECT count(*) FROM stored) AS stored;
-- refused while it is being read
INSERT INTO buf VALUES ('k');
BEGIN;
DECLARE c CURSOR FOR SELECT * FROM buf;
FETCH c;
TRUNCATE buf;
ROLLBACK;
SELECT * FROM buf;

--
-- A cursor shows the buffer as it was when it was first fetched from
--
INSERT INTO buf VALUES ('k2'), ('k3');
BEGIN;
DECLARE c SCROLL CURSOR FOR SELECT * FROM buf ORDER BY key;
FETCH c;
SELECT sb_increment('k2', 100, 'buf');
SELECT sb_async_increment('k4', 100, 'buf');
FETCH ALL FROM c;
FETCH BACKWARD 2 FROM c;
CLOSE c;
SELECT * FROM buf ORDER BY key;
ROLLBACK;
SELECT * FROM buf ORDER BY key;

--
-- DDL in the transaction that counts
--
-- dropped: what was counted goes with it, and comes back with it
BEGIN;
INSERT INTO buf2 VALUES ('k', 5);
DROP FOREIGN TABLE buf2;
ROLLBACK;
SELECT * FROM buf2;
INSERT INTO buf2 VALUES ('k', 7);
BEGIN;
INSERT INTO buf2 VALUES ('k', 5);
SELECT sb_async_increment('k', 5, 'buf2');
DROP FOREIGN TABLE buf2;
INSERT INTO buf VALUES ('k', 1000);
COMMIT;
SELECT * FROM buf ORDER BY key;
SELECT sb_increment('k', 1, 'buf2');
-- dropped in a subtransaction that is rolled back
CREATE FOREIGN TABLE buf2 (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
SELECT * FROM buf2;
BEGIN;
INSERT INTO buf2 VALUES ('k', 5);
SAVEPOINT s;
DROP FOREIGN TABLE buf2;
ROLLBACK TO s;
INSERT INTO buf2 VALUES ('k', 6);
COMMIT;
SELECT * FROM buf2;
DROP FOREIGN TABLE buf2;
-- made, used and dropped, or rolled back
BEGIN;
CREATE FOREIGN TABLE buf2 (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h');
INSERT INTO buf2 VALUES ('k', 5);
SELECT sb_async_increment('k', 6, 'buf2');
SELECT * FROM buf2;
DROP FOREIGN TABLE buf2;
COMMIT;
BEGIN;
CREATE FOREIGN TABLE buf2 (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h');
INSERT INTO buf2 VALUES ('k', 5);
SELECT sb_async_increment('k', 6, 'buf2');
ROLLBACK;
SELECT to_regclass('buf2');
-- made in a transaction that is committed
BEGIN;
CREATE FOREIGN TABLE buf2 (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
INSERT INTO buf2 VALUES ('k', 5);
SELECT sb_async_increment('k', 6, 'buf2');
COMMIT;
SELECT * FROM buf2;

-- altered: options, name, owner's other doings
BEGIN;
INSERT INTO buf2 VALUES ('k', 1);
ALTER FOREIGN TABLE buf2 OPTIONS (SET interval '2h');
INSERT INTO buf2 VALUES ('k', 1);
ALTER FOREIGN TABLE buf2 RENAME TO buf3;
INSERT INTO buf3 VALUES ('k', 1);
ALTER FOREIGN TABLE buf3 RENAME key TO word;
INSERT INTO buf3 VALUES ('k', 1);
COMMENT ON FOREIGN TABLE buf3 IS 'three';
COMMIT;
SELECT * FROM buf3;
-- its columns: what was counted before would have no meaning any more
BEGIN;
INSERT INTO buf3 VALUES ('k', 100);
ALTER FOREIGN TABLE buf3 ALTER word TYPE varchar;
COMMIT;
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM buf3;
BEGIN;
INSERT INTO buf3 VALUES ('k', 100);
ALTER FOREIGN TABLE buf3 DROP count;
COMMIT;
SELECT * FROM buf3;
-- counted first and altered in a subtransaction that is rolled back
BEGIN;
INSERT INTO buf3 VALUES ('k', 10);
SAVEPOINT s;
ALTER FOREIGN TABLE buf3 DROP count, ADD more text, ADD count bigint;
ROLLBACK TO s;
INSERT INTO buf3 VALUES ('k', 1);
COMMIT;
SELECT * FROM buf3;
-- stopped and counted, in either order
BEGIN;
SELECT sb_increment('k', 1000, 'buf3');
ALTER FOREIGN TABLE buf3 OPTIONS (ADD stopped 'true');
SELECT sb_increment('k', 1000, 'buf3');
ROLLBACK;
SELECT * FROM buf3;

DROP FOREIGN TABLE buf, buf3;
DROP FUNCTION store(text, bigint);
DROP FUNCTION count_down;
DROP PROCEDURE count_in_steps;
DROP TABLE stored;
