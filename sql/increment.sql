--
-- increment: the forms of sb_increment(), sb_async_increment() and sb_count()
--

CREATE TABLE page_views (path text PRIMARY KEY, views bigint NOT NULL);
CREATE FUNCTION store_views(path text, counter bigint) RETURNS void
LANGUAGE sql AS $$
  INSERT INTO page_views VALUES (path, counter)
  ON CONFLICT (path) DO UPDATE SET views = page_views.views + EXCLUDED.views
$$;

-- Nothing is due within this test, unless it is asked for.
CREATE FOREIGN TABLE hits (path text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer
  OPTIONS (handler 'store_views', interval '1h', timeout '1h');

-- A buffer that nothing was counted in holds no key.
SELECT sb_count('/home', 'hits');
SELECT * FROM hits;

-- By 1, by 10, with arguments by position, by name, in any order: 15.
SELECT sb_increment('/home', buffer => 'hits');
SELECT sb_increment('/home', 10, 'hits');
SELECT sb_increment('/home', count => 2, buffer => 'hits');
SELECT sb_increment(buffer => 'hits', key => '/home');
SELECT sb_increment('/home', 1, buffer => 'hits');
SELECT sb_increment('/home'::text, 1::bigint, 'hits'::regclass);
SELECT sb_count('/home', 'hits');
SELECT sb_count(key => '/home', buffer => 'hits');

-- The same for the one that does not wait for the transaction's end: 30.
SELECT sb_async_increment('/home', buffer => 'hits');
SELECT sb_async_increment('/home', 10, 'hits');
SELECT sb_async_increment('/home', count => 2, buffer => 'hits');
SELECT sb_async_increment(buffer => 'hits', key => '/home');
SELECT sb_async_increment('/home'::text, 1::bigint, 'hits'::regclass);
SELECT sb_count('/home', 'hits');

-- The result is what the transaction has added to the key: by each of the ways
-- to count, without what was rolled back, and without what others count.
CREATE FUNCTION outside() RETURNS bigint LANGUAGE sql AS $$
  SELECT sb_async_increment('/own', 1000, 'hits')
$$;
BEGIN;
SELECT sb_increment('/own', 5, 'hits');
SELECT sb_increment('/own', -2, 'hits'), sb_increment('/own', 0, 'hits');
SELECT outside();
INSERT INTO hits VALUES ('/own', 10);
SELECT sb_increment('/own', 1, 'hits');
SAVEPOINT s;
SELECT sb_increment('/own', 100, 'hits');
ROLLBACK TO s;
SELECT sb_increment('/own', 1, 'hits');
SAVEPOINT s;
SELECT sb_increment('/own', 100, 'hits');
RELEASE s;
SELECT sb_increment('/own', 1, 'hits'), sb_increment('/other', 1, 'hits');
SELECT array_agg(sb_increment('/own', n, 'hits')) FROM generate_series(1, 4) AS n;
SELECT array_agg(sb_increment('/own' || n % 2, n, 'hits')) FROM generate_series(1, 6) AS n;
ROLLBACK;
SELECT sb_increment('/own', 5, 'hits');
SELECT sb_increment('/own', 5, 'hits');
SELECT sb_count('/own', 'hits');
-- A key whose text is long has no other result.
BEGIN;
SELECT sb_increment(repeat('/', 300), 5, 'hits');
SELECT array_agg(sb_increment(repeat('/', 300), n, 'hits')) FROM generate_series(1, 4) AS n;
ROLLBACK;
DROP FUNCTION outside();
-- TRUNCATE discards what was added.
CREATE FOREIGN TABLE emptied (path text NOT NULL, count bigint NOT NULL)
  SERVER statbuffer OPTIONS (handler 'store_views', interval '1h');
BEGIN;
SELECT sb_increment('/own', 5, 'emptied');
TRUNCATE emptied;
SELECT sb_increment('/own', 1, 'emptied');
ROLLBACK;
DROP FOREIGN TABLE emptied;

-- A relation may be named with its schema.
SELECT sb_increment('/home', buffer => 'public.hits');
SELECT sb_count('/home', 'public.hits');

-- Keys are told apart by every byte.
SELECT sb_increment(key, buffer => 'hits')
  FROM unnest(ARRAY['', ' ', '/Home', '/home ', '/home?', '/home']) AS key;
SELECT * FROM hits ORDER BY path COLLATE "C";

-- A count may be negative; a key may come to a negative count.
SELECT sb_increment('/down', 3, 'hits');
SELECT sb_increment('/down', -5, 'hits');
SELECT sb_count('/down', 'hits');
SELECT sb_async_increment('/down', -1, 'hits');
SELECT sb_count('/down', 'hits');

-- To add nothing is no error, and does not make a key.
SELECT sb_increment('/nothing', 0, 'hits');
SELECT sb_async_increment('/nothing', 0, 'hits');
SELECT sb_count('/nothing', 'hits');
SELECT count(*) FROM hits WHERE path = '/nothing';
SELECT count(*) FROM sb_keys('hits') WHERE key = '/nothing';

-- Neither does what adds up to nothing show in a scan.
SELECT sb_increment('/up-and-down', 7, 'hits');
SELECT sb_increment('/up-and-down', -7, 'hits');
SELECT sb_count('/up-and-down', 'hits');
SELECT count(*) FROM hits WHERE path = '/up-and-down';

-- A null count is an error, a null key too, because the column is NOT NULL.
SELECT sb_increment('/home', NULL, 'hits');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_async_increment('/home', NULL, 'hits');
SELECT sb_increment(NULL, 1, 'hits');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_async_increment(NULL, 1, 'hits');
SELECT sb_increment(NULL::int, 1, 'hits');

-- Many keys in one statement, and one key many times: 6, and 1000 and 500500.
SELECT count(sb_increment('/k' || i % 3, 1, 'hits'))
  FROM generate_series(1, 6) AS i;
SELECT count(sb_increment('/once', i, 'hits'))
  FROM generate_series(1, 1000) AS i;
SELECT path, count FROM hits WHERE path LIKE '/k_' OR path = '/once'
  ORDER BY path COLLATE "C";

-- One statement may count in several buffers.
CREATE FOREIGN TABLE other_hits (path text NOT NULL, count bigint NOT NULL)
  SERVER statbuffer OPTIONS (handler 'store_views', interval '1h');
SELECT sb_increment(key, n, buffer)
  FROM (VALUES ('/a', 1, 'hits'::regclass), ('/a', 2, 'other_hits'),
               ('/a', 4, 'hits'), ('/a', 8, 'other_hits'))
    AS v (key, n, buffer);
SELECT sb_count('/a', 'hits') AS hits, sb_count('/a', 'other_hits') AS other_hits;

-- INSERT adds, too: each row its count, or 1 by the column's default.
INSERT INTO hits VALUES ('/inserted', 4);
INSERT INTO hits (path) VALUES ('/inserted');
INSERT INTO hits (path, count) VALUES ('/inserted', DEFAULT), ('/inserted', -2);
SELECT sb_count('/inserted', 'hits');
INSERT INTO hits VALUES (NULL, 1);
\echo :LAST_ERROR_SQLSTATE
INSERT INTO hits VALUES ('/inserted', NULL);
\echo :LAST_ERROR_SQLSTATE
-- There is no default here.
INSERT INTO other_hits (path) VALUES ('/inserted');
SELECT sb_count('/inserted', 'hits');

-- There is no default buffer yet: every function says so.
SELECT sb_increment('/home');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_increment(1);
SELECT sb_async_increment('/home');
SELECT sb_count('/home');
SELECT sb_flush('/home');
SELECT sb_flush_all();
SELECT sb_drain();
SELECT sb_stop();
SELECT * FROM sb_keys();
SELECT sb_stat_reset();

SELECT sb_total('/home');
SELECT * FROM sb_totals();
-- The default buffer is meant by '-', too.
SELECT sb_increment('/home', 1, '-');
SELECT sb_count('/home', 0::regclass);

-- A null buffer is an error, for every function: it may be a variable that was
-- not set.
SELECT sb_increment('/home', 1, NULL);
\echo :LAST_ERROR_SQLSTATE
SELECT sb_increment(1, 1, NULL);
SELECT sb_increment('a'::"char", 1, NULL);
SELECT sb_async_increment('/home', 1, NULL);
SELECT sb_count('/home', NULL);
SELECT sb_total('/home', NULL);
SELECT * FROM sb_totals(NULL);
SELECT sb_flush('/home', NULL);
SELECT sb_flush_all(NULL);
SELECT sb_drain(NULL);
SELECT sb_start(NULL);
SELECT sb_stop(NULL);
SELECT * FROM sb_keys(NULL);
SELECT sb_stat_reset(NULL);
-- So it is in the middle of a statement.
SELECT sb_increment('/home', 1, buffer) FROM (VALUES ('hits'::regclass), (NULL)) AS v (buffer);
SELECT sb_increment('/home', 1, buffer) FROM (VALUES ('hits'::regclass), ('hits'), (NULL)) AS v (buffer);

-- Nor is there a buffer of that name, or of that OID.
SELECT sb_increment('/home', 1, 'no_such_buffer');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_increment('/home', 1, 4294967295);
\echo :LAST_ERROR_SQLSTATE
SELECT sb_count('/home', 4294967295::regclass);

-- Others that do not exist.  What PostgreSQL tells besides is another in 19.
SELECT sb_increment('/home', 'hits');
\set VERBOSITY terse
SELECT sb_increment();
\set VERBOSITY default

-- However long a text is, it is one key for all that count it: a statement that
-- goes from key to key, in which the same key comes again, one that counts once,
-- one whose texts are compressed, the functions that need a stored form, and
-- INSERT.  What is counted in a savepoint that is rolled back is not.
CREATE FOREIGN TABLE lengths (path text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer
  OPTIONS (handler 'store_views', interval '1h', timeout '1h');
CREATE TABLE texts WITH (toast_tuple_target = 128) AS
  SELECT repeat('x', n) AS t, repeat('z', 3000) AS filler FROM generate_series(0, 150) AS n
  UNION ALL SELECT repeat('y', n), repeat('z', 3000) FROM generate_series(1, 1990, 17) AS n;
BEGIN;
SELECT count(sb_increment(t, 1, 'lengths')) FROM texts, generate_series(1, 2);
SELECT count(sb_increment(t, 10, 'lengths')) FROM generate_series(1, 2), texts;
SAVEPOINT s;
SELECT count(sb_increment(t, 1000000, 'lengths')) FROM texts;
ROLLBACK TO s;
SELECT count(sb_async_increment(t, 100, 'lengths')) FROM texts;
COMMIT;
DO $$
DECLARE
  one text;
BEGIN
  FOR one IN SELECT t FROM texts LOOP
    EXECUTE 'SELECT sb_increment($1, 1000, $2)' USING one, 'lengths'::regclass;
    COMMIT;
  END LOOP;
END $$;
INSERT INTO lengths SELECT t, 10000 FROM texts;
SELECT count, count(*), count(DISTINCT path), sum(length(path)) FROM lengths GROUP BY count;
SELECT count(*), sum(length(t)), bool_or(pg_column_size(t) < length(t)) AS compressed
  FROM texts WHERE sb_count(t, 'lengths') = 11122;
DROP FOREIGN TABLE lengths;
DROP TABLE texts;

-- All of it arrives at the handler, and nothing is left.
SELECT path, count INTO counted FROM hits;
SELECT sb_drain('hits');
SELECT * FROM hits;
SELECT count(*) > 0 AS some FROM page_views;
(TABLE counted EXCEPT TABLE page_views)
UNION ALL
(TABLE page_views EXCEPT TABLE counted);

-- What was stored is 0 where the key is still held, and adds up anew.
SELECT sb_count('/home', 'hits');
SELECT sb_increment('/home', 3, 'hits');
SELECT sb_count('/home', 'hits');
SELECT sb_drain('hits');
SELECT views FROM page_views WHERE path = '/home';

-- What is counted goes away with the buffer.
SELECT sb_increment('/home', 1000, 'hits');
DROP FOREIGN TABLE hits, other_hits;
SELECT views FROM page_views WHERE path = '/home';

DROP FUNCTION store_views;
DROP TABLE page_views, counted;
