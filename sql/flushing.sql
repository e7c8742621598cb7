--
-- flushing: what a transaction has counted and asked to be flushed is due when
-- it commits
--
SET statement_timeout = '2min';

CREATE TABLE stored (key text PRIMARY KEY, total bigint NOT NULL);
CREATE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql AS $$
  INSERT INTO stored VALUES (key, counter)
  ON CONFLICT (key) DO UPDATE SET total = stored.total + EXCLUDED.total
$$;
CREATE FOREIGN TABLE buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');

-- In one statement, of a buffer that was never used, and of one that was.
SELECT sb_increment('k', 5, 'buf'), sb_flush('k', 'buf');
SELECT wait_until($$ (SELECT total = 5 FROM stored WHERE key = 'k') $$);
SELECT sb_increment('k', 2, 'buf'), sb_flush('k', 'buf');
SELECT wait_until($$ (SELECT total = 7 FROM stored WHERE key = 'k') $$);
SELECT sb_increment('a', 1, 'buf'), sb_increment('b', 2, 'buf'), sb_flush_all('buf') > 0 AS asked;
SELECT wait_until($$ (SELECT sum(total) = 3 FROM stored WHERE key IN ('a', 'b')) $$);

-- What others have counted for the key before goes with it.
SELECT sb_increment('k', 10, 'buf');
BEGIN;
SELECT sb_increment('k', 20, 'buf');
SELECT sb_flush('k', 'buf');
SELECT sb_increment('k', 40, 'buf');
COMMIT;
SELECT wait_until($$ (SELECT total = 77 FROM stored WHERE key = 'k') $$);

-- Only this key is flushed, and not those counted beside it.
BEGIN;
INSERT INTO buf VALUES ('wanted', 1), ('unwanted', 1);
SELECT sb_flush('wanted', 'buf');
COMMIT;
SELECT wait_until($$ EXISTS (SELECT FROM stored WHERE key = 'wanted') $$);
SELECT key, count FROM buf;

-- All are, with those that come in the same transaction later.
BEGIN;
SELECT sb_increment('first', 1, 'buf');
SELECT sb_flush_all('buf') > 0 AS asked;
SELECT sb_increment('later', 1, 'buf');
COMMIT;
SELECT wait_until($$ (SELECT count(*) = 3 FROM stored WHERE key IN ('first', 'later', 'unwanted')) $$);

-- Many keys.
BEGIN;
SELECT count(*) FROM (SELECT sb_increment('n' || n, n, 'buf'), sb_flush('n' || n, 'buf') FROM generate_series(1, 5000) n) s;
SELECT sb_increment('not asked for', 1, 'buf');
COMMIT;
SELECT wait_until($$ (SELECT sum(total) = 12502500 AND count(*) = 5000 FROM stored WHERE key ~ '^n[0-9]') $$);
SELECT key, count FROM buf;

-- What is rolled back is neither counted nor asked for.
BEGIN;
SELECT sb_increment('undone', 1, 'buf');
SAVEPOINT sp;
SELECT sb_increment('undone', 10, 'buf'), sb_flush('undone', 'buf');
ROLLBACK TO sp;
SELECT sb_increment('undone', 2, 'buf');
SAVEPOINT sp;
SELECT sb_flush('undone', 'buf');
ROLLBACK TO sp;
SAVEPOINT sp;
SELECT sb_flush_all('buf') > 0 AS asked;
ROLLBACK TO sp;
COMMIT;
BEGIN;
SELECT sb_increment('never', 1, 'buf'), sb_flush('never', 'buf'), sb_flush_all('buf') > 0 AS asked;
ROLLBACK;
-- What is released is.
BEGIN;
SELECT sb_increment('released', 1, 'buf');
SAVEPOINT s1;
SAVEPOINT s2;
SELECT sb_flush('released', 'buf');
RELEASE s2;
RELEASE s1;
SAVEPOINT s3;
SELECT sb_increment('released', 10, 'buf');
ROLLBACK TO s3;
COMMIT;
SELECT wait_until($$ (SELECT total = 1 FROM stored WHERE key = 'released') $$);
SELECT key, count FROM buf ORDER BY key;
-- So it is with exceptions.
DO $$
BEGIN
  PERFORM sb_increment('caught', 1, 'buf');
  BEGIN
    PERFORM sb_flush('caught', 'buf');
    RAISE 'undo';
  EXCEPTION WHEN raise_exception THEN
    PERFORM sb_increment('kept', 1, 'buf'), sb_flush('kept', 'buf');
  END;
END $$;
SELECT wait_until($$ EXISTS (SELECT FROM stored WHERE key = 'kept') $$);
SELECT key, count FROM buf ORDER BY key;
-- And with all.
BEGIN;
SAVEPOINT sp;
SELECT sb_increment('last', 1, 'buf'), sb_flush_all('buf') > 0 AS asked;
RELEASE sp;
COMMIT;
SELECT wait_until($$ (SELECT count(*) = 4 FROM stored WHERE key IN ('last', 'caught', 'undone', 'not asked for')) $$);
SELECT key, total FROM stored WHERE key IN ('undone', 'never', 'caught') ORDER BY key;

-- Increments that cancel out leave nothing to flush.
SELECT sb_increment('zero', 1, 'buf'), sb_increment('zero', -1, 'buf'), sb_flush('zero', 'buf');
SELECT sb_increment('end', 1, 'buf'), sb_flush('end', 'buf');
SELECT wait_until($$ EXISTS (SELECT FROM stored WHERE key = 'end') $$);
SELECT count(*) FROM stored WHERE key = 'zero';

-- The result says whether there is something to flush: in the buffer or in the
-- transaction, a count that is not 0.
SELECT sb_drain('buf');
SELECT sb_flush('no such key', 'buf'), sb_flush('end', 'buf');
-- (of another one, whose worker may be late to carry it out)
CREATE FOREIGN TABLE empty (key text, count bigint) SERVER statbuffer OPTIONS (handler 'store');
SELECT sb_flush_all('empty');
DROP FOREIGN TABLE empty;
INSERT INTO buf VALUES ('r1', 1), ('r2', 1), ('r3', -1), ('r3', 1);
SELECT sb_flush('r1', 'buf'), sb_flush('r3', 'buf');
SELECT wait_until($$ (SELECT sum(total) = 1 FROM stored WHERE key ~ '^r[0-9]') $$);
-- (what was in flight may be seen for a moment longer)
SELECT wait_until($$ NOT sb_flush('r1', 'buf') $$);
INSERT INTO buf VALUES ('r4', 1), ('r5', 1);
BEGIN;
INSERT INTO buf VALUES ('r2', 1), ('r5', -1), ('r6', 1), ('r7', 1), ('r7', -1), ('r8', 0);
-- r2, r4, r5 and r6
SELECT sb_flush_all('buf');
SELECT sb_flush('r2', 'buf') AS r2, sb_flush('r6', 'buf') AS r6, sb_flush('r7', 'buf') AS r7;
COMMIT;
SELECT wait_until($$ (SELECT sum(total) = 5 FROM stored WHERE key ~ '^r[0-9]') $$);
SELECT sb_drain('buf');
SELECT sb_flush_all('buf');

-- Keys of other types.
CREATE FUNCTION store(a int, b text, counter bigint) RETURNS void LANGUAGE sql AS $$
  INSERT INTO stored VALUES (a || b, counter)
$$;
CREATE FOREIGN TABLE pairs (a int NOT NULL, b text, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h');
SELECT sb_increment(ROW(7, 'en'), 3, 'pairs'), sb_flush(ROW(7, 'en'), 'pairs');
SELECT wait_until($$ (SELECT total = 3 FROM stored WHERE key = '7en') $$);

-- What is due stays due when the interval is made longer: it was asked for.
CREATE FOREIGN TABLE waiting (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store_waiting', interval '1h');
SELECT sb_increment('asked for', 4, 'waiting');
SET client_min_messages = error;
SELECT sb_drain('waiting', '100ms');
RESET client_min_messages;
BEGIN;
CREATE FUNCTION store_waiting(key text, counter bigint) RETURNS void LANGUAGE sql
AS $$ INSERT INTO stored VALUES (key, counter) $$;
ALTER FOREIGN TABLE waiting OPTIONS (SET interval '2h');
COMMIT;
SELECT wait_until($$ (SELECT total = 4 FROM stored WHERE key = 'asked for') $$);

DROP FOREIGN TABLE waiting;
DROP FUNCTION store_waiting(text, bigint);
DROP FOREIGN TABLE buf, pairs;
DROP FUNCTION store(text, bigint), store(int, text, bigint);
DROP TABLE stored;
