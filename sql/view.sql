--
-- view: an updatable view of a target, in which an UPDATE of the count counts
--

-- A drain that would never end ends the test.
SET statement_timeout = '2min';

CREATE TABLE pages (id int GENERATED ALWAYS AS IDENTITY, path text PRIMARY KEY, title text DEFAULT 'untitled',
  views bigint NOT NULL DEFAULT 0, loud text GENERATED ALWAYS AS (upper(title)) STORED);
INSERT INTO pages (path, title, views) VALUES ('/home', 'Home', 10), ('/about', 'About', 20);
SELECT sb_create('hits', 'pages', 'views', 'interval=1h', 'timeout=1h', 'backoff=1h');
SELECT sb_create_view('page_counts', 'hits');
SELECT attname, format_type(atttypid, atttypmod), pg_get_expr(adbin, adrelid)
  FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
  WHERE attrelid = 'page_counts'::regclass ORDER BY attnum;
SELECT replace(pg_get_viewdef('page_counts'), 't.', '') AS definition, reloptions FROM pg_class WHERE oid = 'page_counts'::regclass;

--
-- UPDATE counts what it adds
--
INSERT INTO hits VALUES ('/home', 1);
SELECT * FROM page_counts ORDER BY id;
UPDATE page_counts SET views = views + 1 WHERE path = '/home';
UPDATE page_counts SET views = views + 5 WHERE path = '/home' RETURNING path, views, loud;
SELECT views, sb_count(path, 'hits') FROM pages WHERE path = '/home';
UPDATE page_counts SET views = views + 1;
SELECT path, views FROM page_counts ORDER BY id;
UPDATE page_counts SET views = views + 1 WHERE path = '/none';
SELECT sb_count('/none', 'hits');
SELECT sb_drain('hits');
SELECT path, views FROM pages ORDER BY id;
SELECT path, views FROM page_counts ORDER BY id;
-- It follows the transaction, and sees its own.
BEGIN;
UPDATE page_counts SET views = views + 100 WHERE path = '/home';
UPDATE page_counts SET views = views * 2 WHERE path = '/home' RETURNING views;
SAVEPOINT s;
UPDATE page_counts SET views = -1 WHERE path = '/home' RETURNING views;
ROLLBACK TO s;
SELECT views FROM page_counts WHERE path = '/home';
ROLLBACK;
SELECT views FROM page_counts WHERE path = '/home';
-- an absolute value: the difference is counted
INSERT INTO hits VALUES ('/home', 3);
UPDATE page_counts SET views = 7 WHERE path = '/home';
SELECT views, sb_count(path, 'hits'), sb_total(path, 'hits') FROM pages WHERE path = '/home';
UPDATE page_counts SET views = views WHERE path = '/home';
-- only if it has a value, as an optimistic update does
UPDATE page_counts SET views = 8 WHERE path = '/home' AND views = 7 RETURNING views;
UPDATE page_counts SET views = 8 WHERE path = '/home' AND views = 7 RETURNING views;
SELECT sb_drain('hits');
SELECT path, views FROM pages ORDER BY id;
-- what is no count
UPDATE page_counts SET views = NULL WHERE path = '/home';
UPDATE page_counts SET views = views - 9223372036854775807 WHERE path = '/home' RETURNING views;
UPDATE page_counts SET views = 9223372036854775807 WHERE path = '/home';
UPDATE page_counts SET views = -5 WHERE path = '/home';
UPDATE page_counts SET views = 9223372036854775807 WHERE path = '/home';
TRUNCATE hits;
-- once for each row that is joined
UPDATE page_counts SET views = views + 1 FROM (VALUES ('/home'), ('/home')) AS v (p) WHERE path = p;
TRUNCATE hits;

--
-- Other columns are those of the table
--
UPDATE page_counts SET title = 'Start', views = views + 1 WHERE path = '/home' RETURNING *;
SELECT path, title, views, loud, sb_count(path, 'hits') FROM pages ORDER BY id;
UPDATE page_counts SET title = NULL WHERE path = '/about' RETURNING *;
UPDATE page_counts SET loud = 'X' WHERE path = '/home';
UPDATE page_counts SET path = '/about', views = 0 WHERE path = '/home';
SELECT path, title, views FROM page_counts ORDER BY id;
-- What is counted moves with the key.
INSERT INTO hits VALUES ('/start', 1000);
UPDATE page_counts SET path = '/start', views = views + 1 WHERE path = '/home' RETURNING *;
SELECT path, views, sb_count(path, 'hits') FROM pages ORDER BY id;
SELECT sb_count('/home', 'hits');
SELECT sb_drain('hits');
SELECT path, views FROM pages ORDER BY id;
-- locks for update are those of the table's rows
SELECT path, views FROM page_counts WHERE path = '/start' FOR UPDATE;

--
-- INSERT and DELETE
--
INSERT INTO page_counts (path) VALUES ('/new') RETURNING *;
INSERT INTO page_counts (path, title, views) VALUES ('/newer', NULL, 5), ('/newest', 'News', 0) RETURNING path, title, views, loud;
INSERT INTO page_counts (path) VALUES ('/new');
INSERT INTO page_counts (path, views) VALUES ('/null', NULL);
INSERT INTO page_counts (id, path) VALUES (1, '/id');
INSERT INTO page_counts (path, loud) VALUES ('/loud', 'X');
INSERT INTO page_counts (title) VALUES ('no path');
-- neither is there anything to find a conflict by
INSERT INTO page_counts (path) VALUES ('/new') ON CONFLICT (path) DO UPDATE SET views = page_counts.views + 1;
INSERT INTO page_counts (path) VALUES ('/new') ON CONFLICT DO NOTHING;
UPDATE page_counts SET views = views + 1 WHERE path = '/new';
-- Counts that were there before the row are added to it.
INSERT INTO hits VALUES ('/early', 2);
INSERT INTO page_counts (path, views) VALUES ('/early', 1);
SELECT path, views FROM page_counts WHERE path IN ('/new', '/newer', '/early') ORDER BY path COLLATE "C";
SELECT sb_drain('hits');
SELECT path, views FROM pages WHERE path IN ('/new', '/newer', '/early') ORDER BY path COLLATE "C";
-- What was counted goes with the row.
INSERT INTO hits VALUES ('/new', 10), ('/newer', 10);
DELETE FROM page_counts WHERE path IN ('/new', '/none') RETURNING path, views;
DELETE FROM page_counts WHERE views = 15;
SELECT sb_drain('hits');
SELECT path, views FROM pages ORDER BY path COLLATE "C";
SELECT count(*) FROM hits WHERE views <> 0;
COPY page_counts (path, views) FROM stdin;
/copied	3
/copied too	4
\.
SELECT path, title, views FROM page_counts WHERE path LIKE '/copied%' ORDER BY path COLLATE "C";
-- A trigger of the table prevents it, or changes it.
CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'DELETE' OR NEW.title = 'no' THEN
    RETURN NULL;
  END IF;
  NEW.title := NEW.title || '!';
  RETURN NEW;
END $$;
CREATE TRIGGER meddle BEFORE INSERT OR UPDATE OR DELETE ON pages FOR EACH ROW EXECUTE FUNCTION meddle();
INSERT INTO page_counts (path, title) VALUES ('/no', 'no'), ('/yes', 'yes') RETURNING path, title, views;
UPDATE page_counts SET title = 'no', views = views + 1 WHERE path = '/yes' RETURNING path, title, views;
UPDATE page_counts SET title = 'Yes', views = views + 1 WHERE path = '/yes' RETURNING path, title, views;
DELETE FROM page_counts WHERE path = '/yes' RETURNING path;
SELECT path, title, views FROM page_counts WHERE path IN ('/yes', '/no');
DROP TRIGGER meddle ON pages;
DROP FUNCTION meddle;
-- A trigger of the table alters the buffer.
CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  ALTER FOREIGN TABLE hits ALTER path TYPE varchar;
  RETURN NEW;
END $$;
CREATE TRIGGER meddle BEFORE UPDATE ON pages FOR EACH ROW EXECUTE FUNCTION meddle();
UPDATE page_counts SET title = 'x', views = views + 1 WHERE path = '/yes';
DROP TRIGGER meddle ON pages;
DROP FUNCTION meddle;
TRUNCATE hits;
-- A trigger of the table changes the key, and the count: what is counted goes with
-- the row, to the key that it has then.
CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  NEW.path := lower(NEW.path || COALESCE(NEW.title, ''));
  NEW.views := NEW.views + 1;
  RETURN NEW;
END $$;
CREATE TRIGGER meddle BEFORE UPDATE ON pages FOR EACH ROW WHEN (OLD.title <> NEW.title OR OLD.path <> NEW.path)
  EXECUTE FUNCTION meddle();
INSERT INTO page_counts (path, title) VALUES ('/a', 'A');
INSERT INTO hits VALUES ('/a', 5);
UPDATE page_counts SET title = 'B', views = views + 10 WHERE path = '/a' RETURNING path, views;
SELECT * FROM hits WHERE views <> 0;
SELECT path, views FROM page_counts WHERE title = 'B';
UPDATE page_counts SET path = 'C', views = views + 10 WHERE title = 'B' RETURNING path, views;
SELECT * FROM hits WHERE views <> 0;
SELECT path, views FROM page_counts WHERE title = 'B';
DELETE FROM page_counts WHERE title = 'B' RETURNING path, views;
SELECT * FROM hits WHERE views <> 0;
DROP TRIGGER meddle ON pages;
DROP FUNCTION meddle;
TRUNCATE hits;

--
-- Renamed and altered
--
ALTER FOREIGN TABLE hits RENAME TO clicks;
UPDATE page_counts SET views = views + 1 WHERE path = '/start';
ALTER TABLE pages RENAME title TO caption;
UPDATE page_counts SET title = 'Renamed', views = views + 1 WHERE path = '/start';
SELECT path, title, views FROM page_counts WHERE path = '/start';
ALTER TABLE pages RENAME TO sheets;
UPDATE page_counts SET views = views + 1 WHERE path = '/start';
ALTER FOREIGN TABLE clicks OPTIONS (SET target 'public.sheets');
UPDATE page_counts SET views = views + 1 WHERE path = '/start';
SELECT path, title, views FROM page_counts WHERE path = '/start';
-- another target
CREATE TABLE pages (path text PRIMARY KEY, views bigint);
ALTER FOREIGN TABLE clicks OPTIONS (SET target 'public.pages');
UPDATE page_counts SET views = views + 1 WHERE path = '/start';
ALTER FOREIGN TABLE clicks OPTIONS (SET target 'public.sheets');
DROP TABLE pages;
-- stopped
SELECT sb_stop('clicks') IS NOT NULL AS stopped;
UPDATE page_counts SET views = views + 1 WHERE path = '/start';
SELECT sb_start('clicks') IS NOT NULL AS started;
-- The view depends on what it shows.
\set VERBOSITY terse
DROP FOREIGN TABLE clicks;
DROP TABLE sheets;
\set VERBOSITY default
DROP VIEW page_counts;
DROP FOREIGN TABLE clicks;
DROP TABLE sheets;

--
-- Keys of several columns, of other types, and names that need quotes
--
CREATE SCHEMA "My schema";
CREATE TABLE "My schema"."The ""table""" ("User ID" int, "order" varchar(10), "select" int DEFAULT 7, "count" numeric,
  UNIQUE NULLS NOT DISTINCT ("order", "User ID"));
CREATE FOREIGN TABLE "My schema"."Buf" ("User ID" int, "order" varchar(10), "count" bigint)
  SERVER statbuffer OPTIONS (target '"My schema"."The ""table"""', interval '1h', backoff '1h');
SELECT sb_create_view('"My schema"."A view"', '"My schema"."Buf"');
SELECT replace(pg_get_viewdef('"My schema"."A view"'), 't.', '') AS definition;
INSERT INTO "My schema"."A view" ("User ID", "order", "count") VALUES (1, 'a', 1), (1, NULL, 5), (2, 'a', NULL);
UPDATE "My schema"."A view" SET "count" = "count" + 10 WHERE "User ID" = 1;
UPDATE "My schema"."A view" SET "order" = 'b' WHERE "order" IS NULL RETURNING *;
UPDATE "My schema"."A view" SET "User ID" = NULL, "count" = "count" + 1 WHERE "User ID" = 2 RETURNING *;
SELECT * FROM "My schema"."A view" ORDER BY 1, 2;
SELECT sb_drain('"My schema"."Buf"');
TABLE "My schema"."The ""table""" ORDER BY 1, 2;
DELETE FROM "My schema"."A view" WHERE "User ID" IS NULL;
SELECT * FROM "My schema"."A view" ORDER BY 1, 2;
DROP VIEW "My schema"."A view";
DROP FOREIGN TABLE "My schema"."Buf";
DROP SCHEMA "My schema" CASCADE;

CREATE TYPE mood AS ENUM ('sad', 'happy');
CREATE DOMAIN code AS text CHECK (VALUE <> '');
CREATE TABLE kinds (v varchar(5) UNIQUE, c char(3) UNIQUE, n name UNIQUE, d code UNIQUE, m mood UNIQUE, u uuid UNIQUE,
  t timestamptz UNIQUE, x numeric UNIQUE, a int[] UNIQUE, o "char" UNIQUE, cnt int);
INSERT INTO kinds VALUES ('v', 'c', 'n', 'd', 'sad', '00000000-0000-0000-0000-000000000001', '2026-01-01 00:00Z', 1.50,
  '{1,2}', 'o', 0);
DO $$
DECLARE
  att record;
  total bigint;
BEGIN
  FOR att IN SELECT attname, format_type(atttypid, atttypmod) AS type FROM pg_attribute
    WHERE attrelid = 'kinds'::regclass AND attnum BETWEEN 1 AND 10
  LOOP
    EXECUTE format('CREATE FOREIGN TABLE kind (%I %s NOT NULL, cnt bigint) SERVER statbuffer OPTIONS (target ''kinds'', interval ''1h'')',
                   att.attname, att.type);
    PERFORM sb_create_view('kind_view', 'kind');
    UPDATE kind_view SET cnt = cnt + 1;
    EXECUTE 'SELECT sum(cnt) FROM kind' INTO total;
    IF total IS DISTINCT FROM 1 THEN
      RAISE 'column %: counted %', att.attname, total;
    END IF;
    DROP VIEW kind_view;
    DROP FOREIGN TABLE kind;
  END LOOP;
END $$;
DROP TABLE kinds;
DROP TYPE mood;
DROP DOMAIN code;

--
-- Views that were written by hand
--
CREATE TABLE pages (path text PRIMARY KEY, title text, views bigint);
INSERT INTO pages VALUES ('/home', 'Home', 10);
SELECT sb_create('hits', 'pages', 'views', 'interval=1h');
CREATE VIEW by_hand WITH (security_invoker = true) AS
  SELECT title AS name, sb_total(path, 'hits') AS total, path, length(title) AS len FROM pages WHERE title IS NOT NULL;
CREATE TRIGGER sb_view INSTEAD OF INSERT OR UPDATE OR DELETE ON by_hand FOR EACH ROW EXECUTE FUNCTION sb_view_trigger();
UPDATE by_hand SET total = total + 1, name = 'Start' RETURNING *;
UPDATE by_hand SET len = 3;
INSERT INTO by_hand (path, name, total) VALUES ('/about', 'About', 1) RETURNING *;
DELETE FROM by_hand WHERE path = '/home';
SELECT * FROM by_hand;
SELECT sb_drain('hits');
SELECT * FROM pages ORDER BY path COLLATE "C";
DROP VIEW by_hand;
-- the key twice, and arguments with their names
CREATE VIEW by_hand WITH (security_invoker = true) AS
  SELECT path, title, path AS again, sb_total(buffer => 'hits', key => path) AS total FROM pages;
CREATE TRIGGER sb_view INSTEAD OF INSERT OR UPDATE OR DELETE ON by_hand FOR EACH ROW EXECUTE FUNCTION sb_view_trigger();
UPDATE by_hand SET total = total + 4;
UPDATE by_hand SET again = '/contact', total = total + 1 RETURNING *;
SELECT * FROM hits WHERE views <> 0;
UPDATE by_hand SET again = '/about';
SELECT * FROM hits WHERE views <> 0;
DROP VIEW by_hand;
TRUNCATE hits;
CREATE FUNCTION try_view(definition text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
  detail text;
BEGIN
  EXECUTE 'CREATE VIEW tried AS ' || definition;
  CREATE TRIGGER sb_view INSTEAD OF DELETE ON tried FOR EACH ROW EXECUTE FUNCTION sb_view_trigger();
  DELETE FROM tried;
  RETURN NULL;
EXCEPTION WHEN OTHERS THEN
  GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL;
  RETURN format('%s: %s (%s)', SQLSTATE, SQLERRM, detail);
END $$;
SELECT try_view('SELECT path, views FROM pages');
SELECT try_view('SELECT path, sb_total(path, ''hits'') AS views, sb_total(path, ''hits'') AS again FROM pages');
SELECT try_view('SELECT path, sb_total(title, ''hits'') AS views FROM pages');
SELECT try_view('SELECT path, sb_total(path || '''', ''hits'') AS views FROM pages');
SELECT try_view('SELECT title, sb_total(path, ''hits'') AS views FROM pages');
SELECT try_view('SELECT a.path, sb_total(a.path, ''hits'') AS views FROM pages a, pages b');
SELECT try_view('SELECT DISTINCT path, sb_total(path, ''hits'') AS views FROM pages');
SELECT try_view('SELECT path, sb_total(path, ''hits'') AS views FROM pages LIMIT 1');
SELECT try_view('SELECT path, sb_total(path, ''hits'') AS views FROM (SELECT ''/home''::text AS path) s');
SELECT try_view('SELECT a.path, sb_total(a.path, ''hits'') AS views FROM pages a JOIN pages b USING (path)');
SELECT try_view('SELECT path, sb_total(path, ''hits'') AS views FROM pages UNION SELECT ''/home'', 1');
-- no buffer that is named
SELECT try_view('SELECT path, sb_total(path) AS views FROM pages');
SELECT try_view('SELECT path, sb_total(path, ''-'') AS views FROM pages');
SELECT try_view('SELECT path, sb_total(buffer => ''hits'', key => title) AS views FROM pages');
-- Another function of that name is not taken for ours: its result is no count.
CREATE FUNCTION sb_total(key varchar, buffer regclass) RETURNS text LANGUAGE sql AS 'SELECT $1';
SELECT try_view('SELECT path, sb_total(path::varchar, ''hits'') AS views FROM pages');
SELECT * FROM hits WHERE views <> 0;
DROP FUNCTION sb_total(varchar, regclass);
CREATE FUNCTION sb_total(a int DEFAULT 1, b regclass DEFAULT '-', c int DEFAULT 3) RETURNS bigint LANGUAGE sql AS 'SELECT $1';
SELECT try_view('SELECT path, sb_total(c => 1, b => ''hits'') AS views FROM pages');
DROP FUNCTION sb_total(int, regclass, int);
DROP FUNCTION try_view;
CREATE TRIGGER wrong AFTER INSERT ON pages FOR EACH ROW EXECUTE FUNCTION sb_view_trigger();
INSERT INTO pages VALUES ('/x');
DROP TRIGGER wrong ON pages;

-- A table that inherits has a row of the same key: which one is meant is not to be told.
CREATE TABLE more_pages (PRIMARY KEY (path)) INHERITS (pages);
INSERT INTO more_pages SELECT path, 'more', 0 FROM pages WHERE path = '/about';
SELECT sb_create_view('page_counts', 'hits');
DELETE FROM page_counts WHERE path = '/about';
UPDATE page_counts SET title = 'x' WHERE path = '/about';
DROP VIEW page_counts;
DROP TABLE more_pages;

--
-- Arguments and privileges
--
SELECT sb_create_view(NULL, 'hits');
SELECT sb_create_view('v', NULL);
SELECT sb_create_view('v', 'pages');
SELECT sb_create_view('pages', 'hits');
SELECT sb_create_view('no_such_schema.v', 'hits');
CREATE FOREIGN TABLE untargeted (path text, n bigint) SERVER statbuffer;
SELECT sb_create_view('v', 'untargeted');
DROP FOREIGN TABLE untargeted;

-- A table of that name that comes first on the search path is not meant.
CREATE TEMP TABLE shadowed (a int);
SELECT sb_create_view('public.shadowed', 'hits');
DROP TABLE pg_temp.shadowed;
DROP VIEW shadowed;
CREATE SCHEMA later;
SET search_path = later, public;
CREATE TEMP TABLE shadowed (a int);
SELECT sb_create_view('shadowed', 'hits');
SELECT sb_create('shadowed_counts', 'pages', 'views');
RESET search_path;
DROP VIEW later.shadowed;
DROP FOREIGN TABLE later.shadowed_counts;
DROP SCHEMA later;
DROP TABLE pg_temp.shadowed;

CREATE ROLE regress_app;
SELECT sb_create_view('page_counts', 'hits');
SET ROLE regress_app;
SELECT sb_create_view('v', 'hits');
RESET ROLE;
-- Whoever uses the view needs the rights on what is behind it.
GRANT SELECT, UPDATE, INSERT, DELETE ON page_counts TO regress_app;
SET ROLE regress_app;
SELECT path FROM page_counts;
RESET ROLE; GRANT SELECT ON pages TO regress_app; SET ROLE regress_app;
UPDATE page_counts SET views = views + 1 WHERE path = '/about';
RESET ROLE; GRANT SELECT ON hits TO regress_app; SET ROLE regress_app;
UPDATE page_counts SET views = views + 1 WHERE path = '/about';
RESET ROLE; GRANT INSERT ON hits TO regress_app; SET ROLE regress_app;
UPDATE page_counts SET views = views + 1 WHERE path = '/about' RETURNING views;
UPDATE page_counts SET title = 'x' WHERE path = '/about';
INSERT INTO page_counts (path) VALUES ('/x y');
DELETE FROM page_counts WHERE path = '/about';
RESET ROLE;
-- Row security: what a role does not see it does not count.
ALTER TABLE pages ENABLE ROW LEVEL SECURITY;
SET ROLE regress_app;
UPDATE page_counts SET views = views + 1 RETURNING path;
RESET ROLE;
DROP OWNED BY regress_app;
DROP ROLE regress_app;
DROP VIEW page_counts;
DROP FOREIGN TABLE hits;
DROP TABLE pages;
