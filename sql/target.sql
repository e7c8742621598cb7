--
-- target: counts that go to a column of a table, and what is stored and counted
--

-- A drain that would never end ends the test.
SET statement_timeout = '2min';

CREATE TABLE pages (path text PRIMARY KEY, title text, views bigint NOT NULL DEFAULT 0);

-- Flush all keys of a buffer, and wait until only so many are left, which failed.
CREATE FUNCTION flush_but(buffer regclass, nfailing int) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  PERFORM sb_flush_all(buffer);
  RETURN wait_until(format('(SELECT count(*) FILTER (WHERE failures > 0 AND in_flight = 0) = %s AND count(*) FILTER (WHERE count <> 0 OR in_flight <> 0) = %s FROM sb_keys(%L))',
                           nfailing, nfailing, buffer));
END $$;

--
-- sb_create() writes what one can also write by hand
--
SELECT sb_create('hits', 'pages', 'views', 'interval=1h', 'timeout=1h', 'backoff=1h');
SELECT ftoptions FROM pg_foreign_table WHERE ftrelid = 'hits'::regclass;
SELECT attname, format_type(atttypid, atttypmod), attnotnull FROM pg_attribute
  WHERE attrelid = 'hits'::regclass AND attnum > 0 ORDER BY attnum;
SELECT sb_start('hits') IS NOT NULL AS started;

--
-- The total: stored and counted
--
SELECT sb_total('/home', 'hits');
INSERT INTO hits VALUES ('/home', 10);
SELECT sb_total('/home', 'hits'), sb_count('/home', 'hits');
SELECT sb_drain('hits');
SELECT * FROM pages;
SELECT sb_total('/home', 'hits'), coalesce(sb_count('/home', 'hits'), 0) AS count;
INSERT INTO hits VALUES ('/home', 1), ('/about', 2);
SELECT path, sb_total(path, 'hits') FROM pages;
SELECT * FROM sb_totals('hits') ORDER BY key COLLATE "C";
-- also where a plan could be parallel
SET parallel_setup_cost = 0;
SET parallel_tuple_cost = 0;
SET min_parallel_table_scan_size = 0;
SELECT path, sb_total(path, 'hits') FROM pages;
RESET parallel_setup_cost;
RESET parallel_tuple_cost;
RESET min_parallel_table_scan_size;
-- the caller's own, counted and stored
BEGIN;
INSERT INTO hits VALUES ('/home', 100);
UPDATE pages SET views = views + 1000 WHERE path = '/home';
SELECT sb_total('/home', 'hits');
SAVEPOINT s;
INSERT INTO hits VALUES ('/home', 5);
SELECT sb_total('/home', 'hits');
ROLLBACK TO s;
SELECT sb_total('/home', 'hits');
TRUNCATE hits;
SELECT sb_total('/home', 'hits');
ROLLBACK;
SELECT sb_total('/home', 'hits');
-- In a snapshot that is older than a flush, too, it is that of now.
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT views FROM pages WHERE path = '/home';
SELECT sb_drain('hits');
SELECT views, sb_total(path, 'hits') FROM pages WHERE path = '/home';
COMMIT;
SELECT * FROM pages ORDER BY path COLLATE "C";
-- A row that was there keeps its other columns; a net decrease is stored.
UPDATE pages SET title = 'Home';
ALTER TABLE pages ADD CHECK (views >= 0);
INSERT INTO hits VALUES ('/home', -3), ('/new', 4);
SELECT sb_drain('hits');
SELECT * FROM pages ORDER BY path COLLATE "C";
-- What a constraint refuses is a failure of that key alone.
INSERT INTO hits VALUES ('/home', 1), ('/about', -1000), ('/new', 1);
SELECT flush_but('hits', 1);
SELECT key, count, last_error FROM sb_keys('hits') WHERE count <> 0;
SELECT sb_total('/about', 'hits');
SELECT * FROM pages ORDER BY path COLLATE "C";
TRUNCATE hits;
-- out of bigint's range
UPDATE pages SET views = 9223372036854775807 WHERE path = '/home';
INSERT INTO hits VALUES ('/home', 1);
SELECT sb_total('/home', 'hits');
TRUNCATE hits;
UPDATE pages SET views = 0;

--
-- Renamed, moved, altered and dropped: the buffer says so, and keeps its counts
--
CREATE FUNCTION has_failed(message text) RETURNS boolean LANGUAGE sql
AS $$ SELECT wait_until(format('EXISTS (SELECT FROM sb_stat_buffers WHERE buffer = ''hits'' AND last_error LIKE %L AND sb_flush_all(''hits'') IS NOT NULL)', message || '%')) $$;
ALTER FOREIGN TABLE hits OPTIONS (SET backoff '10ms');
ALTER TABLE pages RENAME TO sheets;
INSERT INTO hits VALUES ('/home', 1);
SELECT sb_flush_all('hits') IS NOT NULL AS asked;
SELECT has_failed('target table public.pages does not exist');
SELECT sb_total('/home', 'hits');
ALTER TABLE sheets RENAME TO pages;
SELECT sb_drain('hits');
ALTER TABLE pages RENAME views TO seen;
INSERT INTO hits VALUES ('/home', 1);
SELECT sb_flush_all('hits') IS NOT NULL AS asked;
SELECT has_failed('target table "pages" has no column "views"');
ALTER FOREIGN TABLE hits RENAME views TO seen;
SELECT sb_drain('hits');
SELECT * FROM pages ORDER BY path COLLATE "C";
ALTER TABLE pages RENAME seen TO views;
ALTER FOREIGN TABLE hits RENAME seen TO views;
CREATE SCHEMA elsewhere;
ALTER TABLE pages SET SCHEMA elsewhere;
ALTER FOREIGN TABLE hits OPTIONS (SET target 'elsewhere.pages');
INSERT INTO hits VALUES ('/home', 1);
SELECT sb_drain('hits'), sb_total('/home', 'hits');
ALTER TABLE elsewhere.pages SET SCHEMA public;
DROP SCHEMA elsewhere;
-- A name that is not qualified is looked up as the owner would.
ALTER FOREIGN TABLE hits OPTIONS (SET target 'pages');
SET search_path = pg_catalog;
INSERT INTO public.hits VALUES ('/home', 1);
SELECT public.sb_total('/home', 'public.hits'), public.sb_drain('public.hits');
RESET search_path;
-- A temporary table of the caller's is not meant.
CREATE TEMP TABLE pages (path text PRIMARY KEY, views bigint);
INSERT INTO pages VALUES ('/home', 1000);
SELECT sb_total('/home', 'hits'), sb_start('hits') IS NOT NULL AS started;
DROP TABLE pg_temp.pages;
-- Its schema is renamed, and another one gets its name.
CREATE SCHEMA live;
ALTER TABLE pages SET SCHEMA live;
ALTER FOREIGN TABLE hits OPTIONS (SET target 'live.pages');
INSERT INTO hits VALUES ('/home', 1);
SELECT sb_drain('hits'), sb_total('/home', 'hits');
ALTER SCHEMA live RENAME TO old;
CREATE SCHEMA live;
CREATE TABLE live.pages (LIKE old.pages INCLUDING ALL);
SELECT sb_total('/home', 'hits');
INSERT INTO hits VALUES ('/home', 1);
SELECT sb_drain('hits'), sb_total('/home', 'hits');
TABLE live.pages;
DROP TABLE live.pages;
DROP SCHEMA live;
ALTER TABLE old.pages SET SCHEMA public;
DROP SCHEMA old;
ALTER FOREIGN TABLE hits OPTIONS (SET target 'public.pages');
TRUNCATE pages;
INSERT INTO hits VALUES ('/home', 7);
SELECT sb_drain('hits'), sb_total('/home', 'hits');
VACUUM FULL pages;
ALTER TABLE pages ALTER views TYPE integer;
INSERT INTO hits VALUES ('/home', 1);
SELECT sb_drain('hits'), sb_total('/home', 'hits');
ALTER TABLE pages ALTER views TYPE numeric;
INSERT INTO hits VALUES ('/home', 1);
SELECT sb_drain('hits'), sb_total('/home', 'hits');
DROP TABLE pages;
SELECT sb_total('/home', 'hits');
-- What is counted is kept until there is such a table again.
INSERT INTO hits VALUES ('/home', 5), ('/new', 2);
SELECT sb_flush_all('hits') IS NOT NULL AS asked;
SELECT has_failed('target table public.pages does not exist');
CREATE TABLE pages (path text PRIMARY KEY, views bigint NOT NULL DEFAULT 100);
SELECT sb_drain('hits');
SELECT * FROM pages ORDER BY path COLLATE "C";
DROP TABLE pages;
DROP FOREIGN TABLE hits;
DROP FUNCTION has_failed;

--
-- What is no target
--
CREATE TABLE t (a int, b text, n bigint NOT NULL DEFAULT 0, g bigint GENERATED ALWAYS AS (n) STORED, txt text);
CREATE VIEW v AS SELECT * FROM t;
CREATE TEMP TABLE tmp (a int PRIMARY KEY, n bigint);
CREATE FOREIGN TABLE buf (a int, n bigint DEFAULT 1) SERVER statbuffer OPTIONS (target 'v');
CREATE FOREIGN TABLE nobody (a int NOT NULL, n bigint) SERVER statbuffer OPTIONS (target 't', handler 'f');
CREATE FOREIGN TABLE nobody (a int NOT NULL, n bigint) SERVER statbuffer OPTIONS (target 'a.b.c.d');
ALTER FOREIGN TABLE buf OPTIONS (ADD handler 'f');
SELECT sb_start('buf');
ALTER FOREIGN TABLE buf OPTIONS (SET target 'buf');
SELECT sb_start('buf');
ALTER FOREIGN TABLE buf OPTIONS (SET target 'pg_temp.tmp');
SELECT sb_start('buf');
ALTER FOREIGN TABLE buf OPTIONS (SET target 'no_such_table');
SELECT sb_start('buf');
SELECT sb_total(1, 'buf');
ALTER FOREIGN TABLE buf OPTIONS (SET target 't');
SELECT sb_start('buf');
-- neither partial, nor deferrable, nor of expressions, nor of other columns
CREATE UNIQUE INDEX t_partial ON t (a) WHERE b IS NULL;
CREATE UNIQUE INDEX t_expression ON t ((a + 1));
CREATE UNIQUE INDEX t_other ON t (a, b);
ALTER TABLE t ADD CONSTRAINT t_deferrable UNIQUE (a) DEFERRABLE;
CREATE INDEX t_plain ON t (a);
SELECT sb_start('buf');
SELECT sb_create('more', 't', 'n');
DROP FOREIGN TABLE more;
DROP INDEX t_other;
SELECT sb_create('more', 't', 'n');
CREATE UNIQUE INDEX t_a ON t (a);
-- null would be another row each time
SELECT sb_start('buf');
ALTER FOREIGN TABLE buf ALTER a SET NOT NULL;
SELECT sb_start('buf') IS NOT NULL AS started;
CREATE UNIQUE INDEX t_b ON t (b);
SELECT sb_create('more', 't', 'n');
ALTER FOREIGN TABLE buf ALTER a TYPE bigint;
SELECT sb_start('buf');
ALTER FOREIGN TABLE buf ALTER a TYPE int;
CREATE TABLE modifiers (a numeric(5,2) PRIMARY KEY, b text COLLATE "C" UNIQUE, c int GENERATED ALWAYS AS (1) STORED UNIQUE, n bigint GENERATED ALWAYS AS IDENTITY, m bigint);
CREATE FOREIGN TABLE modified (a numeric NOT NULL, m bigint) SERVER statbuffer OPTIONS (target 'modifiers');
SELECT sb_start('modified');
ALTER FOREIGN TABLE modified ALTER a TYPE text;
ALTER FOREIGN TABLE modified RENAME a TO b;
SELECT sb_start('modified');
ALTER FOREIGN TABLE modified ALTER b TYPE int;
ALTER FOREIGN TABLE modified RENAME b TO c;
SELECT sb_start('modified');
SELECT sb_create('more', 'modifiers', 'n');
DROP FOREIGN TABLE modified;
DROP TABLE modifiers;
ALTER FOREIGN TABLE buf RENAME a TO c;
SELECT sb_start('buf');
ALTER FOREIGN TABLE buf RENAME c TO a;
ALTER FOREIGN TABLE buf RENAME n TO txt;
SELECT sb_start('buf');
ALTER FOREIGN TABLE buf RENAME txt TO g;
SELECT sb_start('buf');
DROP FOREIGN TABLE buf;
-- A buffer without a target has no total.
CREATE FOREIGN TABLE buf (a int, n bigint) SERVER statbuffer;
SELECT sb_total(1, 'buf');
DROP FOREIGN TABLE buf;
-- arguments of sb_create()
SELECT sb_create(NULL, 't', 'n');
SELECT sb_create('more', NULL, 'n');
SELECT sb_create('more', 't', NULL);
SELECT sb_create('more', 't', 'n', VARIADIC NULL);
SELECT sb_create('more', 0, 'n');
SELECT sb_create('more', 'v', 'n');
DROP INDEX t_b;
SELECT sb_create('more', 't', 'n', NULL);
SELECT sb_create('more', 't', 'n', 'interval');
SELECT sb_create('more', 't', 'n', 'interval=soon');
SELECT sb_create('more', 't', 'n', 'no_such_option=1');
SELECT sb_create('more', 't', 'n', 'handler=f');
SELECT sb_create('t', 't', 'n');
SELECT sb_create('no_such_schema.more', 't', 'n');
SELECT sb_create('more', 't', 'no_such_column');
SELECT sb_create('more', 't', 'a');
DROP VIEW v;
DROP TABLE t, tmp;

--
-- Kinds of tables and keys
--
CREATE TABLE parted (region text COLLATE "C", id int, n bigint, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
CREATE TABLE parted_eu PARTITION OF parted FOR VALUES IN ('eu');
CREATE TABLE parted_us PARTITION OF parted FOR VALUES IN ('us');
SELECT sb_create('"Parted ones"', 'parted', 'n', 'interval=1h', 'backoff=1h');
INSERT INTO "Parted ones" VALUES (1, 'eu', 3), (1, 'us', 4), (2, 'eu', 5);
SELECT sb_drain('"Parted ones"');
INSERT INTO "Parted ones" (id, region) VALUES (1, 'eu');
SELECT sb_total(ROW(1, 'eu'), '"Parted ones"'), sb_total('(2,eu)', '"Parted ones"');
SELECT sb_drain('"Parted ones"');
SELECT tableoid::regclass, * FROM parted ORDER BY id, region;
SELECT * FROM sb_totals('"Parted ones"') ORDER BY key COLLATE "C";
-- no partition for it
INSERT INTO "Parted ones" VALUES (1, 'asia', 1), (2, 'us', 1);
SELECT flush_but('"Parted ones"', 1);
SELECT sb_total(ROW(1, 'asia'), '"Parted ones"');
CREATE TABLE parted_rest PARTITION OF parted DEFAULT;
SELECT flush_but('"Parted ones"', 0);
SELECT tableoid::regclass, * FROM parted ORDER BY id, region;
DROP FOREIGN TABLE "Parted ones";
DROP TABLE parted;

-- Names that need quotes, nulls, null counts, identity and generated columns, triggers.
CREATE SCHEMA "My schema";
CREATE TABLE "My schema"."The ""table""" (
  "select" int, "User ID" bigint GENERATED ALWAYS AS IDENTITY, twice bigint GENERATED ALWAYS AS ("order" * 2) STORED,
  "order" int, made text DEFAULT 'default',
  CONSTRAINT named UNIQUE NULLS NOT DISTINCT ("User ID", "select"));
CREATE FOREIGN TABLE quoted ("select" int, "User ID" bigint NOT NULL, "order" bigint)
  SERVER statbuffer OPTIONS (target '"My schema"."The ""table"""', interval '1h', backoff '1h');
INSERT INTO "My schema"."The ""table""" ("select", "order") VALUES (1, NULL), (NULL, 10);
CREATE TABLE fired (what text);
CREATE FUNCTION fire() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO fired VALUES (format('%s %s: %s', TG_OP, TG_LEVEL, to_json(CASE TG_LEVEL WHEN 'ROW' THEN NEW."order" END)));
  RETURN NEW;
END $$;
CREATE TRIGGER fire BEFORE INSERT OR UPDATE ON "My schema"."The ""table""" FOR EACH ROW EXECUTE FUNCTION fire();
CREATE TRIGGER fire_once AFTER INSERT OR UPDATE ON "My schema"."The ""table""" EXECUTE FUNCTION fire();
INSERT INTO quoted VALUES (1, 1, 5), (NULL, 2, 5);
SELECT sb_drain('quoted');
SELECT "select", "User ID", twice, "order", made FROM "My schema"."The ""table""" ORDER BY 2;
SELECT * FROM fired; TRUNCATE fired;
INSERT INTO quoted VALUES (1, 1, 5), (7, 77, 5);
SELECT sb_total(ROW(NULL::int, 2), 'quoted'), sb_total('(,2)', 'quoted'), sb_total(ROW(1, 1), 'quoted'), sb_total(ROW(7, 77), 'quoted');
SELECT sb_drain('quoted');
SELECT "select", "User ID", twice, "order", made FROM "My schema"."The ""table""" ORDER BY 2;
SELECT * FROM fired;
-- integer's range: a failure of that key
INSERT INTO quoted VALUES (1, 1, 2147483647), (7, 77, 1);
SELECT flush_but('quoted', 1);
SELECT key, count, last_error FROM sb_keys('quoted') WHERE count <> 0;
SELECT sb_total('(1,1)', 'quoted'), sb_total('(7,77)', 'quoted');
DROP FOREIGN TABLE quoted;
DROP SCHEMA "My schema" CASCADE;
DROP TABLE fired;
DROP FUNCTION fire;

-- NOT NULL columns without a default: a notice, and only new keys fail.
CREATE TABLE products (id int PRIMARY KEY, name text NOT NULL, sold bigint);
INSERT INTO products VALUES (1, 'tea');
SELECT sb_create('sales', 'products', 'sold', 'interval=1h', 'backoff=1h');
INSERT INTO sales VALUES (1, 3), (2, 1);
SELECT flush_but('sales', 1);
SELECT * FROM products;
SELECT key, count, last_error FROM sb_keys('sales') WHERE count <> 0;
DROP FOREIGN TABLE sales;
DROP TABLE products;

-- Foreign keys: a key that is not there fails alone, until it is; also at the commit.
CREATE TABLE sites (site text COLLATE "C" PRIMARY KEY);
INSERT INTO sites VALUES ('a'), ('b');
CREATE TABLE site_views (site text COLLATE "C" PRIMARY KEY REFERENCES sites ON DELETE CASCADE, n bigint);
SELECT sb_create('site_counts', 'site_views', 'n', 'interval=1h', 'backoff=1h');
INSERT INTO site_counts VALUES ('a', 3), ('b', 4), ('c', 5);
SELECT flush_but('site_counts', 1);
SELECT * FROM site_views ORDER BY site;
SELECT key, count, last_error FROM sb_keys('site_counts') WHERE count <> 0;
INSERT INTO sites VALUES ('c');
DELETE FROM sites WHERE site = 'a';
SELECT flush_but('site_counts', 0);
SELECT * FROM site_views ORDER BY site;
ALTER TABLE site_views ALTER CONSTRAINT site_views_site_fkey DEFERRABLE INITIALLY DEFERRED;
INSERT INTO site_counts VALUES ('b', 1), ('d', 6);
SELECT flush_but('site_counts', 1);
SELECT * FROM site_views ORDER BY site;
SELECT key, count, last_error FROM sb_keys('site_counts') WHERE count <> 0;
DROP FOREIGN TABLE site_counts;
DROP TABLE site_views, sites;

-- Rules: PostgreSQL takes no INSERT with ON CONFLICT then.
CREATE TABLE ruled (id int PRIMARY KEY, n bigint);
INSERT INTO ruled VALUES (1, 0);
CREATE TABLE rule_log (id int);
CREATE RULE log_it AS ON INSERT TO ruled DO ALSO INSERT INTO rule_log VALUES (NEW.id);
SELECT sb_create('ruled_counts', 'ruled', 'n', 'interval=1h', 'backoff=1h');
INSERT INTO ruled_counts VALUES (1, 5), (2, 6);
SELECT flush_but('ruled_counts', 1);
SELECT * FROM ruled;
SELECT key, count, last_error LIKE '%rules%' AS for_rules FROM sb_keys('ruled_counts') WHERE count <> 0;
DROP FOREIGN TABLE ruled_counts;
DROP TABLE ruled, rule_log;

-- What a trigger skips is gone, with its count.
CREATE TABLE skipped (id int PRIMARY KEY, n bigint);
INSERT INTO skipped VALUES (1, 0), (2, 0);
CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RETURN CASE WHEN NEW.id % 2 = 0 THEN NEW END;
END $$;
CREATE TRIGGER skip BEFORE INSERT OR UPDATE ON skipped FOR EACH ROW EXECUTE FUNCTION skip();
SELECT sb_create('skipped_counts', 'skipped', 'n', 'interval=1h', 'backoff=1h');
INSERT INTO skipped_counts VALUES (1, 5), (2, 6), (3, 7), (4, 8);
SELECT sb_drain('skipped_counts');
SELECT * FROM skipped ORDER BY id;
DROP FOREIGN TABLE skipped_counts;
DROP TABLE skipped;
DROP FUNCTION skip;

-- What the types call equal is one row, though it is more than one key.
CREATE TABLE prices (price numeric PRIMARY KEY, n bigint);
SELECT sb_create('price_counts', 'prices', 'n', 'interval=1h');
INSERT INTO price_counts VALUES (1.0, 3), (1.00, 4), (2, 1);
SELECT sb_drain('price_counts');
SELECT price::int, n FROM prices ORDER BY price;
DROP FOREIGN TABLE price_counts;
DROP TABLE prices;

-- Keys that their text form does not tell, or that it cannot be read from
CREATE TABLE floats (f float8 PRIMARY KEY, n bigint);
SELECT sb_create('float_counts', 'floats', 'n', 'interval=1h');
INSERT INTO float_counts VALUES (0.1234567890123456, 7), ('NaN', 1), ('-0', 2);
SET extra_float_digits = -5;
SELECT * FROM sb_totals('float_counts') ORDER BY total;
RESET extra_float_digits;
SELECT sb_drain('float_counts');
SELECT * FROM sb_totals('float_counts') ORDER BY total;
DROP FOREIGN TABLE float_counts;
DROP TABLE floats;

-- Tables that inherit are not covered by the unique index.
CREATE TABLE parent (id int PRIMARY KEY, n bigint);
CREATE TABLE child (PRIMARY KEY (id)) INHERITS (parent);
SELECT sb_create('inherited', 'parent', 'n', 'interval=1h', 'backoff=1h');
INSERT INTO parent VALUES (1, 0), (2, 0);
INSERT INTO child VALUES (2, 0), (3, 0);
INSERT INTO inherited (id) VALUES (1), (2), (3), (4);
SELECT flush_but('inherited', 1);
SELECT tableoid::regclass, * FROM parent ORDER BY id, 1;
SELECT key, count, last_error FROM sb_keys('inherited') WHERE count <> 0;
DROP FOREIGN TABLE inherited;
DROP TABLE parent, child;

-- Where most keys are new they are inserted at once.  A row that is there all the
-- same is updated, though what is proposed for it would not pass the check.
CREATE TABLE checked (id int PRIMARY KEY, n bigint CHECK (n >= 10));
INSERT INTO checked VALUES (100, 10), (200, 10);
SELECT sb_create('checked_counts', 'checked', 'n', 'interval=1h', 'batch_size=10');
INSERT INTO checked_counts SELECT i, CASE WHEN i % 100 = 0 THEN 1 ELSE 10 END FROM generate_series(1, 300) i WHERE i <> 300;
SELECT sb_drain('checked_counts');
SELECT count(*), sum(n), max(n) FROM checked;
INSERT INTO checked_counts SELECT i, CASE WHEN i % 100 = 0 THEN -1 ELSE 10 END FROM generate_series(1, 500) i WHERE i NOT IN (300, 400, 500);
SELECT sb_drain('checked_counts');
SELECT count(*), sum(n), max(n) FROM checked;
DROP FOREIGN TABLE checked_counts;
DROP TABLE checked;

-- The first keys of a large batch tell how the others are stored.
CREATE TABLE sampled (id int PRIMARY KEY, n bigint);
INSERT INTO sampled SELECT i, 10 FROM generate_series(1, 300) i;
SELECT sb_create('sampled_counts', 'sampled', 'n', 'interval=1h', 'batch_size=2000');
INSERT INTO sampled_counts SELECT i, 10 FROM generate_series(1, 1000) i;
SELECT sb_drain('sampled_counts');
SELECT count(*), sum(n), sum(n) FILTER (WHERE id <= 300) FROM sampled;
DROP FOREIGN TABLE sampled_counts;
INSERT INTO sampled SELECT i, 10 FROM generate_series(2901, 3000) i;
SELECT sb_create('sampled_counts', 'sampled', 'n', 'interval=1h', 'batch_size=2000');
INSERT INTO sampled_counts SELECT i, 10 FROM generate_series(2001, 3000) i;
SELECT sb_drain('sampled_counts');
SELECT count(*), sum(n), sum(n) FILTER (WHERE id > 2900) FROM sampled;
DROP FOREIGN TABLE sampled_counts;
DROP TABLE sampled;

-- Not if a partition has a trigger that may change what is proposed.
CREATE TABLE parted (id int PRIMARY KEY, n bigint) PARTITION BY RANGE (id);
CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (1000);
CREATE FUNCTION start_at_1000() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  NEW.n := NEW.n + 1000;
  RETURN NEW;
END $$;
SELECT sb_create('parted_counts', 'parted', 'n', 'interval=1h');
INSERT INTO parted_counts SELECT i, 1 FROM generate_series(1, 100) i;
SELECT sb_drain('parted_counts');
CREATE TRIGGER start BEFORE INSERT ON parted_1 FOR EACH ROW EXECUTE FUNCTION start_at_1000();
INSERT INTO parted_counts SELECT i, 1 FROM generate_series(1, 101) i;
SELECT sb_drain('parted_counts');
SELECT min(n), max(n), count(*), sum(n) FROM parted;
DROP FOREIGN TABLE parted_counts;
DROP TABLE parted;
DROP FUNCTION start_at_1000;

-- One key at a time
CREATE TABLE pages (path text PRIMARY KEY, views bigint NOT NULL DEFAULT 0);
SELECT sb_create('hits', 'pages', 'views', 'interval=0', 'batch_size=1');
INSERT INTO hits VALUES ('a', 1), ('b', 2);
SELECT wait_until('(SELECT count(*) FROM pages) = 2');
INSERT INTO hits VALUES ('a', 1), ('b', 2);
SELECT wait_until('(SELECT sum(views) FROM pages) = 6');
SELECT * FROM pages ORDER BY path COLLATE "C";

--
-- Privileges
--
CREATE ROLE regress_reader;
CREATE ROLE regress_counter LOGIN;
GRANT USAGE ON FOREIGN SERVER statbuffer TO regress_counter;
GRANT CREATE ON SCHEMA public TO regress_counter;
SET ROLE regress_reader;
SELECT sb_total('a', 'hits');
RESET ROLE; GRANT SELECT ON hits TO regress_reader; SET ROLE regress_reader;
SELECT sb_total('a', 'hits');
RESET ROLE; GRANT SELECT (path, views) ON pages TO regress_reader; SET ROLE regress_reader;
SELECT sb_total('a', 'hits');
RESET ROLE;
-- Row security: what the caller does not see is not stored, for him.
ALTER TABLE pages ENABLE ROW LEVEL SECURITY;
SET ROLE regress_reader;
SELECT sb_total('a', 'hits');
RESET ROLE;
SELECT sb_total('a', 'hits');
-- The owner of the buffer needs what the statements need.
SET ROLE regress_counter;
SELECT sb_create('his', 'pages', 'views');
RESET ROLE; GRANT SELECT, INSERT ON pages TO regress_counter; SET ROLE regress_counter;
SELECT sb_create('his', 'pages', 'views');
RESET ROLE; GRANT UPDATE (views) ON pages TO regress_counter; SET ROLE regress_counter;
SELECT sb_create('his', 'pages', 'views', 'interval=1h', 'backoff=1h');
INSERT INTO his VALUES ('a', 10), ('hidden', 1);
RESET ROLE;
SELECT flush_but('his', 2);
SELECT key, count, last_error FROM sb_keys('his') WHERE count <> 0 ORDER BY key;
-- A right that is missing is a failure of the buffer, and discards nothing.
ALTER FOREIGN TABLE his OPTIONS (ADD restart 'temporary', SET backoff '10ms');
REVOKE UPDATE (views) ON pages FROM regress_counter;
SELECT sb_flush_all('his') IS NOT NULL AS asked;
SELECT wait_until('(SELECT last_error LIKE ''%does not have UPDATE privilege%'' FROM sb_stat_buffers WHERE buffer = ''his'')');
SELECT sum(count + in_flight) FROM sb_keys('his');
-- in this order: a flush that has the right fails for row security, which may discard
ALTER FOREIGN TABLE his OPTIONS (DROP restart, SET backoff '1h');
GRANT UPDATE (views) ON pages TO regress_counter;
CREATE POLICY open ON pages TO regress_counter USING (path <> 'hidden');
SELECT flush_but('his', 1);
SELECT * FROM pages ORDER BY path COLLATE "C";
SELECT key, count, last_error FROM sb_keys('his') WHERE count <> 0 ORDER BY key;
DROP FOREIGN TABLE his, hits;
-- Triggers of the target run as the owner of the buffer, so it may not be just anybody's.
ALTER TABLE pages OWNER TO regress_counter;
SELECT sb_create('hits', 'pages', 'views');
ALTER TABLE pages OWNER TO CURRENT_USER;
CREATE TABLE parts (path text PRIMARY KEY, views bigint) PARTITION BY HASH (path);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES WITH (MODULUS 1, REMAINDER 0);
ALTER TABLE parts_1 OWNER TO regress_counter;
SELECT sb_create('hits', 'parts', 'views');
GRANT regress_counter TO regress_reader;
ALTER TABLE pages OWNER TO regress_counter;
GRANT CREATE ON SCHEMA public TO regress_reader;
GRANT USAGE ON FOREIGN SERVER statbuffer TO regress_reader;
SET ROLE regress_reader;
SELECT sb_create('hits', 'pages', 'views');
RESET ROLE;
DROP FOREIGN TABLE hits;
DROP TABLE pages, parts;
REVOKE USAGE ON FOREIGN SERVER statbuffer FROM regress_reader;
REVOKE CREATE ON SCHEMA public FROM regress_reader;
REVOKE USAGE ON FOREIGN SERVER statbuffer FROM regress_counter;
REVOKE CREATE ON SCHEMA public FROM regress_counter;
DROP ROLE regress_reader, regress_counter;
DROP FUNCTION flush_but;
