--
-- stats: the view sb_stat_buffers, sb_keys() and sb_stat_reset()
--
SET statement_timeout = '2min';

CREATE TABLE stored (key text, total bigint);
CREATE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF key LIKE 'bad%' THEN
    RAISE 'cannot store %', key;
  END IF;
  INSERT INTO stored VALUES (key, counter);
END $$;
CREATE FOREIGN TABLE buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer
  OPTIONS (handler 'store', interval '1h', timeout '1h', backoff '1h');
CREATE FUNCTION sums() RETURNS TABLE (keys bigint, pending bigint, in_flight bigint,
  increments bigint, flushed_keys bigint, flushed_count bigint, handler_calls bigint,
  failures bigint, discarded bigint) LANGUAGE sql AS $$
  SELECT keys, pending, in_flight, increments, flushed_keys, flushed_count, handler_calls,
         failures, discarded
    FROM sb_stat_buffers WHERE buffer = 'buf'
$$;

-- One row a buffer, also of one that nothing was done with yet.
SELECT buffer, owner = current_user AS own, state, pid, oldest_due, last_flush,
       last_error, last_error_at
  FROM sb_stat_buffers;
SELECT * FROM sums();
SELECT * FROM sb_keys('buf');

-- A start brings its worker up.
SELECT sb_start('buf');
SELECT wait_until($$ (SELECT state = 'running' AND pid IS NOT NULL FROM sb_stat_buffers
                      WHERE buffer = 'buf') $$);

-- Counting.  An increment is one however much it adds; what is rolled back is none.
SELECT sb_increment('a', 10, 'buf');
SELECT sb_increment('a', -3, 'buf');
SELECT sb_async_increment('b', 5, 'buf');
INSERT INTO buf VALUES ('b', 1), ('c', 1);
BEGIN;
SELECT sb_increment('d', 1, 'buf');
ROLLBACK;
BEGIN;
SELECT sb_increment('a', 1, 'buf');
SELECT sb_increment('a', 1, 'buf');
SAVEPOINT s;
SELECT sb_increment('a', 1, 'buf');
ROLLBACK TO s;
-- not published yet
SELECT * FROM sums();
COMMIT;
SELECT * FROM sums();
SELECT memory > 13000 AS some_memory, oldest_due BETWEEN now() + interval '59 min' AND now() + interval '61 min' AS due
  FROM sb_stat_buffers WHERE buffer = 'buf';
-- The keys, with what is counted of each, but not what is the caller's own.
BEGIN;
SELECT sb_increment('a', 1000, 'buf');
SELECT key, count, in_flight, due_at BETWEEN now() + interval '59 min' AND now() + interval '61 min' AS due,
       failures, last_error
  FROM sb_keys('buf') ORDER BY key;
ROLLBACK;

-- Flushing: three keys, three calls, 9 + 6 + 1.
SELECT sb_drain('buf');
SELECT wait_until('(SELECT flushed_count = 16 AND in_flight = 0 FROM sums())');
SELECT * FROM sums();
SELECT wait_until($$ (SELECT last_flush BETWEEN now() - interval '1 min' AND clock_timestamp()
                      FROM sb_stat_buffers WHERE buffer = 'buf') $$);
SELECT state, oldest_due FROM sb_stat_buffers WHERE buffer = 'buf';
-- An idle key stays for a while, with nothing in it and no time.
SELECT key, count, in_flight, due_at, failures, last_error FROM sb_keys('buf') ORDER BY key;
SELECT sb_count('a', 'buf') AS idle, sb_count('d', 'buf') AS never_counted;

-- Many keys a call: one call, two keys, a sum of 30.
CREATE FUNCTION store(keys text[], counters bigint[]) RETURNS void LANGUAGE sql
AS 'INSERT INTO stored SELECT * FROM unnest(keys, counters)';
INSERT INTO buf VALUES ('a', 10), ('b', 20);
SELECT sb_drain('buf');
SELECT wait_until('(SELECT flushed_count = 46 AND in_flight = 0 FROM sums())');
SELECT * FROM sums();
DROP FUNCTION store(text[], bigint[]);

-- Reset: what was counted since is zero, what is held stays.
SELECT sb_increment('a', 5, 'buf');
SELECT sb_stat_reset('buf');
SELECT * FROM sums();
SELECT last_flush, last_error, last_error_at, stats_reset BETWEEN now() - interval '1 min' AND clock_timestamp() AS reset_now
  FROM sb_stat_buffers WHERE buffer = 'buf';
SELECT sb_increment('a', 5, 'buf');
SELECT sb_drain('buf');
SELECT wait_until('(SELECT flushed_count = 10 AND in_flight = 0 FROM sums())');
SELECT * FROM sums();

-- A failing key: its attempts, last error and next time; others go on.
SELECT sb_stat_reset('buf');
INSERT INTO buf VALUES ('bad', 100), ('good', 1);
SELECT sb_flush_all('buf');
SELECT wait_until($$ (SELECT failures > 0 AND last_error IS NOT NULL FROM sb_keys('buf') WHERE key = 'bad') $$);
SELECT wait_until('(SELECT flushed_count = 1 AND in_flight = 0 FROM sums())');
SELECT key, count, in_flight, failures, last_error,
       due_at BETWEEN now() + interval '59 min' AND now() + interval '61 min' AS backs_off
  FROM sb_keys('buf') WHERE count <> 0;
SELECT state, pending, failures, flushed_keys, flushed_count, discarded, last_error,
       last_error_at BETWEEN now() - interval '1 min' AND clock_timestamp() AS just_now,
       oldest_due > now() + interval '59 min' AS late
  FROM sb_stat_buffers WHERE buffer = 'buf';
-- After a reset the statistics are zero, but the key still fails.
SELECT sb_stat_reset('buf');
SELECT state, failures, last_error, last_error_at FROM sb_stat_buffers
  WHERE buffer = 'buf';
SELECT key, count, failures, last_error FROM sb_keys('buf') WHERE count <> 0;
-- With TRUNCATE it is gone, and all is well.
TRUNCATE buf;
SELECT wait_until($$ (SELECT state = 'running' FROM sb_stat_buffers
                      WHERE buffer = 'buf') $$);
SELECT pending, in_flight FROM sums();
SELECT key FROM sb_keys('buf') WHERE count <> 0 OR failures <> 0 OR last_error IS NOT NULL;
-- So with one that is stored at last.
INSERT INTO buf VALUES ('bad', 100);
SELECT sb_flush('bad', 'buf');
SELECT wait_until($$ (SELECT failures > 0 AND last_error IS NOT NULL FROM sb_keys('buf') WHERE key = 'bad') $$);
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql
AS 'INSERT INTO stored VALUES (key, counter)';
SELECT sb_drain('buf');
SELECT state FROM sb_stat_buffers WHERE buffer = 'buf';
SELECT key, count, failures, last_error FROM sb_keys('buf') WHERE key = 'bad';
-- The last error stays for those who look later.
SELECT last_error, last_error_at IS NOT NULL AS at FROM sb_stat_buffers
  WHERE buffer = 'buf';

-- A long error text is cut where a character ends.
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE plpgsql
AS $$ BEGIN RAISE '%', repeat('0123456789', 1000); END $$;
INSERT INTO buf VALUES ('long');
SELECT sb_flush('long', 'buf');
SELECT wait_until($$ (SELECT failures > 0 AND last_error IS NOT NULL FROM sb_keys('buf') WHERE key = 'long') $$);
SELECT length(last_error) > 100 AND repeat('0123456789', 1000) LIKE last_error || '%' AS its_beginning
  FROM sb_keys('buf') WHERE key = 'long';
SELECT length(last_error) > 100 AND repeat('0123456789', 1000) LIKE last_error || '%' AS its_beginning
  FROM sb_stat_buffers WHERE buffer = 'buf';
TRUNCATE buf;
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql
AS 'INSERT INTO stored VALUES (key, counter)';

-- An idle key's memory is given back after "timeout": the buffer does not
-- hold it any more.  Its process goes, too.
INSERT INTO buf SELECT 'idle' || i, 1 FROM generate_series(1, 3000) AS i;
SELECT memory AS full, sb_count('idle1', 'buf') FROM sb_stat_buffers
  WHERE buffer = 'buf' \gset
SELECT sb_drain('buf');
SELECT sb_count('idle1', 'buf');
ALTER FOREIGN TABLE buf OPTIONS (SET timeout '50ms');
SELECT wait_until($$ sb_count('idle1', 'buf') IS NULL $$);
SELECT wait_until($$ NOT EXISTS (SELECT FROM sb_keys('buf')) $$);
SELECT wait_until($$ (SELECT state = 'idle' AND pid IS NULL FROM sb_stat_buffers
                      WHERE buffer = 'buf') $$);
SELECT keys, pending, in_flight, memory < :full AS less_memory, oldest_due
  FROM sb_stat_buffers WHERE buffer = 'buf';
-- A key with something counted is held as long as it takes, without a process.
SELECT sb_increment('held', 1, 'buf');
SELECT wait_until($$ (SELECT state = 'idle' AND pid IS NULL FROM sb_stat_buffers
                      WHERE buffer = 'buf') $$);
SELECT sb_count('held', 'buf');
SELECT keys, pending, oldest_due > now() + interval '50 min' AS due FROM sb_stat_buffers
  WHERE buffer = 'buf';
-- The next request or increment brings it up again.
SELECT sb_increment('held', 1, 'buf');
SELECT sb_drain('buf');
SELECT * FROM stored WHERE key = 'held';

-- The text of keys.
CREATE FUNCTION store(a int, b text, counter bigint) RETURNS void LANGUAGE sql AS '';
CREATE FOREIGN TABLE buf2 (a int, b text, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h');
INSERT INTO buf2 VALUES (1, 'one'), (2, 'two words'), (3, NULL), (NULL, NULL),
  (4, ''), (5, '"quoted", (all)');
SELECT key, count FROM sb_keys('buf2') ORDER BY key COLLATE "C";
-- Of all buffers, the view has a row for each, by its name; there may be two of
-- one name.
CREATE SCHEMA "Other";
CREATE FOREIGN TABLE "Other".buf2 (a int, count bigint NOT NULL)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h');
SELECT sb_increment(1, 10, '"Other".buf2');
SELECT schemaname, buffer, pending FROM sb_stat_buffers ORDER BY schemaname, buffer;
SELECT relid::regclass, sb_count('1', relid) FROM sb_stat_buffers WHERE schemaname = 'Other';
SELECT pending FROM sb_stat_buffers WHERE buffer = 'buf2' AND schemaname = 'public';
SET client_min_messages = warning;
DROP SCHEMA "Other" CASCADE;
RESET client_min_messages;
DROP FOREIGN TABLE buf2;
SELECT buffer FROM sb_stat_buffers;
DROP FUNCTION store(int, text, bigint);

-- What all buffers take is seen, also of one that is not committed.
SELECT wait_until($$ (SELECT m.buffers = 1 AND m.keys = b.keys FROM sb_stat_memory m, sb_stat_buffers b) $$);
BEGIN;
CREATE FOREIGN TABLE provisional (key text NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store');
SELECT count(sb_async_increment('k' || i, 1, 'provisional')) FROM generate_series(1, 3) AS i;
SELECT wait_until($$ (SELECT m.buffers = 2 AND m.keys = sum(b.keys) AND m.keys >= 3 AND m.memory > sum(b.memory) / 2
                      FROM sb_stat_memory m, sb_stat_buffers b GROUP BY m.buffers, m.keys, m.memory) $$);
SELECT max_memory = pg_size_bytes(current_setting('statbuffer.max_memory')) AS max_memory,
       (mapped IS NULL) = (current_setting('server_version_num')::int < 170000) AS mapped
  FROM sb_stat_memory;
ROLLBACK;
SELECT wait_until($$ (SELECT m.buffers = 1 AND m.keys = b.keys FROM sb_stat_memory m, sb_stat_buffers b) $$);
SELECT has_table_privilege('public', 'sb_stat_memory', 'SELECT') AS everybody;

-- The process tells what it is in pg_stat_activity.
SELECT sb_increment('k', 1, 'buf');
SELECT sb_drain('buf');
ALTER FOREIGN TABLE buf OPTIONS (SET timeout '1h');
SELECT sb_start('buf');
SELECT wait_until($$ EXISTS (SELECT FROM sb_stat_buffers b JOIN pg_stat_activity a USING (pid)
                             WHERE buffer = 'buf'
                               AND a.backend_type = 'statbuffer worker'
                               AND a.datname = current_database()
                               AND a.usename = b.owner
                               AND a.query LIKE '%buf%') $$);

DROP FOREIGN TABLE buf;
DROP FUNCTION store(text, bigint);
DROP FUNCTION sums;
DROP TABLE stored;
