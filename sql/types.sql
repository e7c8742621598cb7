--
-- types: keys of one column and of several, of any type
--

-- One handler for whatever one column can be: it keeps what it was told.
CREATE TABLE told (n serial, key text, counter bigint);
CREATE FUNCTION tell(key anycompatible, counter bigint) RETURNS void
LANGUAGE sql AS 'INSERT INTO told (key, counter) VALUES (key::text, counter)';
CREATE FUNCTION tell_any(key anyelement, counter bigint) RETURNS void
LANGUAGE sql AS 'INSERT INTO told (key, counter) VALUES (key::text, counter)';

--
-- int, bigint, smallint
--
CREATE FOREIGN TABLE by_int (id int NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h', timeout '1h');
SELECT sb_increment(7, buffer => 'by_int');
SELECT sb_increment(7::smallint, buffer => 'by_int');
SELECT sb_increment(7::bigint, buffer => 'by_int');
-- as an assignment would: rounded
SELECT sb_increment(7.4, buffer => 'by_int');
SELECT sb_increment(6.5::numeric, buffer => 'by_int');
-- text by the input function, blanks and all
SELECT sb_increment('7', buffer => 'by_int');
SELECT sb_increment(' 7 '::text, buffer => 'by_int');
-- what INSERT would take, too
INSERT INTO by_int VALUES (7), ('7');
SELECT sb_count(7, 'by_int') AS int, sb_count('7', 'by_int') AS text,
       sb_count(7::bigint, 'by_int') AS bigint;
-- A row of one field is the one column.
SELECT sb_increment(ROW(7), buffer => 'by_int');
SELECT * FROM by_int;
-- What cannot be converted is an error.
SELECT sb_increment('seven', buffer => 'by_int');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_increment('', buffer => 'by_int');
SELECT sb_increment(3000000000, buffer => 'by_int');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_increment('3000000000', buffer => 'by_int');
SELECT sb_increment(true, buffer => 'by_int');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_increment(now(), buffer => 'by_int');
SELECT sb_async_increment(now(), buffer => 'by_int');
SELECT sb_count(now(), 'by_int');
SELECT sb_flush(now(), 'by_int');
SELECT sb_increment('a8b0a2c6-1111-4222-8333-444455556666'::uuid, buffer => 'by_int');
SELECT sb_increment(NULL::int, buffer => 'by_int');
SELECT sb_increment(NULL, buffer => 'by_int');
SELECT sb_increment(ROW(1, 2), buffer => 'by_int');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_increment(ROW('seven'::name), buffer => 'by_int');
SELECT sb_increment(NULL::record, buffer => 'by_int');
SELECT * FROM by_int;
-- To ask for a key that no column could hold is an error as well.
SELECT sb_count('seven', 'by_int');
SELECT sb_drain('by_int');
SELECT key, counter FROM told; TRUNCATE told;
DROP FOREIGN TABLE by_int;

-- An int is an int8 column's key.
CREATE FOREIGN TABLE by_bigint (id bigint NOT NULL, n bigint NOT NULL)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h');
SELECT sb_increment(7, buffer => 'by_bigint');
SELECT sb_increment(7::smallint, buffer => 'by_bigint');
SELECT sb_increment(-9223372036854775808, buffer => 'by_bigint');
SELECT sb_increment('9223372036854775807', buffer => 'by_bigint');
SELECT * FROM by_bigint ORDER BY id;
SELECT sb_drain('by_bigint');
SELECT key, counter FROM told ORDER BY n; TRUNCATE told;
DROP FOREIGN TABLE by_bigint;

--
-- text: what has an assignment cast to it may be the key
--
CREATE FOREIGN TABLE by_text (key text NOT NULL, n bigint NOT NULL)
  SERVER statbuffer OPTIONS (handler 'tell', interval '1h');
SELECT sb_increment(42, buffer => 'by_text');
SELECT sb_increment('42'::varchar, buffer => 'by_text');
SELECT sb_increment('42'::name, buffer => 'by_text');
SELECT sb_increment('42'::char(5), buffer => 'by_text');
SELECT sb_increment(ROW('42'), buffer => 'by_text');
SELECT sb_increment(ROW('42'::text), buffer => 'by_text');
SELECT sb_increment('42'::jsonb, buffer => 'by_text');
SELECT sb_count('42', 'by_text');
SELECT * FROM by_text;
DROP FOREIGN TABLE by_text;

--
-- varchar(n), char(n)
--
CREATE FOREIGN TABLE by_varchar (key varchar(3) NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell', interval '1h');
SELECT sb_increment('abc', buffer => 'by_varchar');
SELECT sb_increment('abc   ', buffer => 'by_varchar');
SELECT sb_increment('abcd', buffer => 'by_varchar');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_increment('abcd'::varchar, buffer => 'by_varchar');
SELECT sb_increment(1234, buffer => 'by_varchar');
SELECT sb_increment(ROW('abcd'), buffer => 'by_varchar');
SELECT sb_async_increment('abcd', buffer => 'by_varchar');
INSERT INTO by_varchar VALUES ('abcd');
SELECT * FROM by_varchar;
DROP FOREIGN TABLE by_varchar;

CREATE FOREIGN TABLE by_char (key char(3) NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell', interval '1h');
SELECT sb_increment('a', buffer => 'by_char');
SELECT sb_increment('a  ', buffer => 'by_char');
SELECT sb_increment('a'::bpchar, buffer => 'by_char');
INSERT INTO by_char VALUES ('a');
SELECT *, octet_length(key) FROM by_char;
DROP FOREIGN TABLE by_char;

--
-- uuid, jsonb, timestamptz, boolean, bytea, inet, an enum
--
CREATE FOREIGN TABLE by_uuid (id uuid NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h', timeout '1h');
SELECT sb_increment('a8b0a2c6-1111-4222-8333-444455556666'::uuid, buffer => 'by_uuid');
SELECT sb_increment('A8B0A2C6111142228333444455556666', buffer => 'by_uuid');
INSERT INTO by_uuid VALUES ('{a8b0a2c6-1111-4222-8333-444455556666}');
SELECT sb_increment('a8b0', buffer => 'by_uuid');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM by_uuid;
SELECT sb_drain('by_uuid');
SELECT key, counter FROM told; TRUNCATE told;
DROP FOREIGN TABLE by_uuid;

CREATE FOREIGN TABLE by_jsonb (doc jsonb NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h');
SELECT sb_increment('{"a": 1, "b": [true, null]}'::jsonb, buffer => 'by_jsonb');
SELECT sb_increment('{"b": [true,null], "a": 1}', buffer => 'by_jsonb');
INSERT INTO by_jsonb VALUES ('{"b":[true,null],"a":0,"a":1}'), ('null');
SELECT sb_increment('{', buffer => 'by_jsonb');
SELECT * FROM by_jsonb ORDER BY doc;
SELECT sb_drain('by_jsonb');
SELECT key, counter FROM told ORDER BY n; TRUNCATE told;
DROP FOREIGN TABLE by_jsonb;

CREATE FOREIGN TABLE by_time (at timestamptz(0) NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h');
-- The same moment, in other words.
SELECT sb_increment('2026-01-02 03:04:05+00'::timestamptz, buffer => 'by_time');
SELECT sb_increment('2026-01-02 05:04:05+02', buffer => 'by_time');
SELECT sb_increment('2026-01-01 19:04:05 PST', buffer => 'by_time');
-- The column's precision applies to all.
SELECT sb_increment('2026-01-02 03:04:05.4+00', buffer => 'by_time');
SELECT sb_increment('2026-01-02 03:04:05.4+00'::timestamptz, buffer => 'by_time');
INSERT INTO by_time VALUES ('2026-01-02 03:04:05.4+00');
-- A date is a time, in this session's time zone.
SELECT sb_increment(date '2026-01-02', buffer => 'by_time');
SELECT sb_increment('infinity', buffer => 'by_time');
SET timezone = 'UTC';
SELECT * FROM by_time ORDER BY at;
SELECT key, count FROM sb_keys('by_time') ORDER BY key;
RESET timezone;
SELECT sb_drain('by_time');
SELECT key::timestamptz = '2026-01-02 03:04:05+00' AS that, counter
  FROM told ORDER BY n; TRUNCATE told;
DROP FOREIGN TABLE by_time;

CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
CREATE FOREIGN TABLE by_mood (mood mood NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h');
SELECT sb_increment('happy'::mood, buffer => 'by_mood');
SELECT sb_increment('happy', 2, buffer => 'by_mood');
SELECT sb_increment('sad', 3, buffer => 'by_mood');
SELECT sb_increment('angry', buffer => 'by_mood');
SELECT * FROM by_mood ORDER BY mood;
SELECT sb_drain('by_mood');
-- by the type's own order
SELECT key, counter FROM told ORDER BY n; TRUNCATE told;
DROP FOREIGN TABLE by_mood;
DROP TYPE mood;

CREATE FOREIGN TABLE by_bool (yes boolean NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h');
SELECT sb_increment(i % 3 = 0, buffer => 'by_bool') FROM generate_series(1, 4) AS i;
SELECT sb_increment('yes', buffer => 'by_bool');
SELECT * FROM by_bool ORDER BY yes;
DROP FOREIGN TABLE by_bool;

-- Arrays
CREATE FOREIGN TABLE by_array (ids int[] NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h');
SELECT sb_increment(ARRAY[1, 2], buffer => 'by_array');
SELECT sb_increment(ARRAY[1, 2]::bigint[], 2, 'by_array'), sb_async_increment(ARRAY[1, 2], 4, 'by_array');
SELECT sb_increment('{1,2}', 8, 'by_array'), sb_increment('{}'::int[], 1, 'by_array');
SELECT sb_increment(ARRAY['a'], 1, 'by_array');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_count(ARRAY[1, 2], 'by_array'), sb_flush(ARRAY[2, 1], 'by_array');
SELECT sb_total(ARRAY[1, 2], 'by_array');
SELECT * FROM by_array ORDER BY ids;
DROP FOREIGN TABLE by_array;

-- "char", which could be text as well as any type, and the types of text
CREATE FOREIGN TABLE by_letter (letter "char" NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h');
SELECT sb_increment('a'::"char", buffer => 'by_letter');
SELECT sb_increment('a', 2, 'by_letter'), sb_increment('a'::text, 4, 'by_letter'),
       sb_increment('a'::varchar, 8, 'by_letter'), sb_increment('a'::name, 16, 'by_letter'),
       sb_increment('a'::bpchar, 32, 'by_letter'), sb_async_increment('a'::"char", 64, 'by_letter');
SELECT sb_count('a'::"char", 'by_letter'), sb_flush('b'::"char", 'by_letter');
SELECT sb_total('a'::"char", 'by_letter');
SELECT * FROM by_letter;
DROP FOREIGN TABLE by_letter;
CREATE FOREIGN TABLE by_text (key text NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell', interval '1h');
SELECT sb_increment('a'::"char", buffer => 'by_text'), sb_increment('a', 2, 'by_text'),
       sb_increment(ARRAY['a'], buffer => 'by_text');
PREPARE of_any AS SELECT sb_increment($1, 4, 'by_text');
EXECUTE of_any ('a');
DEALLOCATE of_any;
SELECT * FROM by_text ORDER BY key;
DROP FOREIGN TABLE by_text;

CREATE FOREIGN TABLE by_bytea (b bytea NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h');
SELECT sb_increment('\x00ff00'::bytea, buffer => 'by_bytea');
SELECT sb_increment('\x00FF00', buffer => 'by_bytea');
SELECT sb_increment('\x00ff', buffer => 'by_bytea');
SELECT * FROM by_bytea ORDER BY b;
DROP FOREIGN TABLE by_bytea;

CREATE FOREIGN TABLE by_inet (ip inet NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h');
SELECT sb_increment('10.0.0.1'::inet, buffer => 'by_inet');
SELECT sb_increment('10.0.0.1/32', buffer => 'by_inet');
SELECT sb_increment('10.0.0.0/8'::cidr, buffer => 'by_inet');
SELECT * FROM by_inet ORDER BY ip;
DROP FOREIGN TABLE by_inet;

--
-- What a type calls equal but stores differently is held apart, and handed
-- over together.
--
CREATE FOREIGN TABLE by_numeric (price numeric NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h', timeout '1h');
SELECT sb_increment(1.0, 1, 'by_numeric');
SELECT sb_increment(1.00, 2, 'by_numeric');
SELECT sb_increment('1', 4, 'by_numeric');
SELECT sb_increment(1, 8, 'by_numeric');
SELECT sb_increment('NaN', 16, 'by_numeric');
SELECT sb_increment(2.50, 32, 'by_numeric');
-- These come to nothing together: the handler does not hear of them.
SELECT sb_increment(3.0, 64, 'by_numeric');
SELECT sb_increment(3.00, -64, 'by_numeric');
SELECT * FROM by_numeric ORDER BY price, n;
SELECT sb_count(1.0, 'by_numeric'), sb_count(1.00, 'by_numeric');
SELECT sb_drain('by_numeric');
SELECT key::numeric + 0.000 AS key, counter FROM told ORDER BY told.n; TRUNCATE told;
SELECT * FROM by_numeric;
-- typmod: 1.005 and 1.01 are one key here
CREATE FOREIGN TABLE by_cents (price numeric(5, 2) NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h');
SELECT sb_increment(1.005, 1, 'by_cents');
SELECT sb_increment('1.005', 2, 'by_cents');
SELECT sb_increment(ROW(1.01), 4, 'by_cents');
INSERT INTO by_cents VALUES (1.005, 8);
SELECT sb_increment(1000, 1, 'by_cents');
SELECT * FROM by_cents;
DROP FOREIGN TABLE by_numeric, by_cents;

-- So with float's two zeros.
CREATE FOREIGN TABLE by_float (f float8 NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h');
SELECT sb_increment('0', 1, 'by_float');
SELECT sb_increment('-0', 2, 'by_float');
SELECT sb_drain('by_float');
SELECT counter FROM told; TRUNCATE told;
DROP FOREIGN TABLE by_float;

-- A collation that does not tell upper from lower case merges, and citext.
-- Where the server was built without the one or the other, the keys stay
-- apart, and only that is looked at.
SELECT EXISTS (SELECT FROM pg_collation WHERE collprovider = 'i') AS has_icu,
       EXISTS (SELECT FROM pg_available_extensions WHERE name = 'citext') AS has_citext
\gset
\if :has_icu
CREATE COLLATION ignoring_case
  (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
\else
CREATE COLLATION ignoring_case FROM "C";
\endif
\if :has_citext
SET client_min_messages = warning;
CREATE EXTENSION citext;
RESET client_min_messages;
\else
CREATE DOMAIN citext AS text;
\endif

CREATE FOREIGN TABLE by_word
  (word text COLLATE ignoring_case NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h', timeout '1h');
SELECT sb_increment('word', 1, 'by_word');
SELECT sb_increment('Word', 2, 'by_word');
SELECT sb_increment('WORD', 4, 'by_word');
SELECT count(*), sum(n) FROM by_word;
SELECT sb_count('Word', 'by_word');
SELECT sb_drain('by_word');
SELECT count(*) = CASE WHEN :'has_icu' THEN 1 ELSE 3 END AS merged,
       sum(counter), bool_and(lower(key) = 'word') AS that_word
  FROM told; TRUNCATE told;

CREATE FOREIGN TABLE by_citext (word citext NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h', timeout '1h');
SELECT sb_increment('word', 1, 'by_citext');
SELECT sb_increment('Word', 2, 'by_citext');
SELECT sb_increment('WORD'::citext, 4, 'by_citext');
SELECT count(*), sum(n) FROM by_citext;
SELECT sb_drain('by_citext');
SELECT count(*) = CASE WHEN :'has_citext' THEN 1 ELSE 3 END AS merged,
       sum(counter), bool_and(lower(key) = 'word') AS that_word
  FROM told; TRUNCATE told;

DROP FOREIGN TABLE by_word, by_citext;
DROP COLLATION ignoring_case;
\if :has_citext
DROP EXTENSION citext;
\else
DROP DOMAIN citext;
\endif

-- A type that has no order of its own: json and point.  Its values are told
-- apart by their bytes.
CREATE FOREIGN TABLE by_json (doc json NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h');
SELECT sb_increment('{"a":1}'::json, buffer => 'by_json');
SELECT sb_increment('{"a":1}', buffer => 'by_json');
SELECT sb_increment('{"a": 1}', buffer => 'by_json');
SELECT sb_drain('by_json');
SELECT key, counter FROM told ORDER BY counter; TRUNCATE told;

CREATE FOREIGN TABLE by_point (p point NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h');
SELECT sb_increment(point(1, 2), 1, 'by_point');
SELECT sb_increment('(1,2)', 2, 'by_point');
SELECT sb_increment(point(2, 1), 4, 'by_point');
SELECT sb_drain('by_point');
SELECT key, counter FROM told ORDER BY counter; TRUNCATE told;
DROP FOREIGN TABLE by_json, by_point;

--
-- composite: a row of the column's own type is the value of that column
--
CREATE TYPE place AS (town text, street int);
CREATE TABLE places (id int, p place);
INSERT INTO places VALUES (1, ROW('Ulm', 1)), (2, ROW('Ulm', NULL));
CREATE FOREIGN TABLE by_place (p place NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h', timeout '1h');
-- However it was made, it is one key.
SELECT sb_increment(ROW('Ulm', 1)::place, 1, 'by_place');
SELECT sb_increment('(Ulm,1)', 2, 'by_place');
SELECT sb_increment(p, 4, 'by_place') FROM places WHERE id = 1;
SELECT sb_increment(ROW(ROW('Ulm', 1)::place), 8, 'by_place');
INSERT INTO by_place VALUES (ROW('Ulm', 1), 16);
INSERT INTO by_place SELECT p, 32 FROM places WHERE id = 1;
SELECT sb_increment(p, 64, 'by_place') FROM places WHERE id = 2;
SELECT * FROM by_place ORDER BY p;
SELECT sb_count(ROW('Ulm', 1)::place, 'by_place');
-- A field that is compressed in its table is no other value.
CREATE TABLE compressed (town text, other text);
INSERT INTO compressed SELECT repeat('x', 1500), repeat('y', 700);
SELECT sb_increment(ROW(town, 1)::place, 128, 'by_place') FROM compressed;
SELECT sb_count(ROW(repeat('x', 1500), 1)::place, 'by_place');
SELECT sb_increment(ROW(repeat('x', 1500), 1)::place, -128, 'by_place');
DROP TABLE compressed;
-- Its fields are not the buffer's columns.
SELECT sb_increment(ROW('Ulm', 1), buffer => 'by_place');
SELECT sb_drain('by_place');
SELECT key, counter FROM told ORDER BY n; TRUNCATE told;
DROP FOREIGN TABLE by_place;

--
-- arrays: by INSERT, as text, or as the field of a row
--
CREATE FOREIGN TABLE by_tags (tags text[] NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h', timeout '1h');
INSERT INTO by_tags VALUES ('{a,b}', 1), (ARRAY['a', 'b'], 2);
SELECT sb_increment(ROW(ARRAY['a', 'b']), 4, 'by_tags');
SELECT sb_increment('{a,b}', 8, 'by_tags');
SELECT sb_increment(ROW('{a,b}'), 16, 'by_tags');
SELECT sb_increment(ROW('{a,NULL}'), 32, 'by_tags');
INSERT INTO by_tags VALUES ('{}', 64), ('[0:1]={a,b}', 128), ('{{a,b}}', 256);
SELECT * FROM by_tags ORDER BY n;
SELECT sb_count(ROW(ARRAY['a', 'b']), 'by_tags'), sb_count('{a,b}', 'by_tags');
SELECT sb_increment('a,b', buffer => 'by_tags');
SELECT sb_drain('by_tags');
SELECT key, counter FROM told ORDER BY counter; TRUNCATE told;
DROP FOREIGN TABLE by_tags;

--
-- domains: their constraints hold
--
CREATE DOMAIN even AS int NOT NULL CHECK (VALUE % 2 = 0);
CREATE FOREIGN TABLE by_even (id even, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h');
SELECT sb_increment(2, 1, 'by_even');
SELECT sb_increment('2', 2, 'by_even');
SELECT sb_increment(2::even, 4, 'by_even');
INSERT INTO by_even VALUES (2, 8);
SELECT * FROM by_even;
SELECT sb_increment(3, 1, 'by_even');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_increment('3', 1, 'by_even');
SELECT sb_increment(ROW(3), 1, 'by_even');
INSERT INTO by_even VALUES (3);
SELECT sb_increment(NULL::int, 1, 'by_even');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_increment(NULL::text, 1, 'by_even');
SELECT sb_increment(ROW(NULL::int), 1, 'by_even');
INSERT INTO by_even VALUES (NULL);
SELECT * FROM by_even;
DROP FOREIGN TABLE by_even;

CREATE DOMAIN small_tags AS text[] CHECK (cardinality(VALUE) < 3);
CREATE FOREIGN TABLE by_small_tags (tags small_tags, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h');
SELECT sb_increment(ROW(ARRAY['a', 'b']), 1, 'by_small_tags');
SELECT sb_increment('{a,b}', 2, 'by_small_tags');
SELECT sb_increment(ROW(ARRAY['a', 'b', 'c']), 1, 'by_small_tags');
SELECT sb_increment('{a,b,c}', 1, 'by_small_tags');
SELECT * FROM by_small_tags;
DROP FOREIGN TABLE by_small_tags;

-- A domain has the order of the type that it is made of.
CREATE DOMAIN price AS numeric;
CREATE FOREIGN TABLE by_price (price price, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_any', interval '1h');
SELECT sb_increment(1.0, 1, 'by_price');
SELECT sb_increment(1.00, 2, 'by_price');
SELECT sb_drain('by_price');
SELECT key::numeric + 0.000 AS key, counter FROM told; TRUNCATE told;
DROP FOREIGN TABLE by_price;

--
-- nulls: a key like any other, where the column allows it
--
CREATE FOREIGN TABLE by_maybe (key text, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell', interval '1h', timeout '1h');
SELECT sb_increment(NULL, 1, 'by_maybe');
SELECT sb_increment(NULL::text, 2, 'by_maybe');
SELECT sb_increment(NULL::int, 4, 'by_maybe');
SELECT sb_increment(ROW(NULL), 8, 'by_maybe');
SELECT sb_async_increment(NULL, 16, 'by_maybe');
INSERT INTO by_maybe VALUES (NULL, 32);
SELECT sb_increment('', 64, 'by_maybe');
SELECT *, key IS NULL AS is_null FROM by_maybe ORDER BY n;
SELECT sb_count(NULL, 'by_maybe') AS null_key, sb_count('', 'by_maybe') AS empty_key;
SELECT key, count FROM sb_keys('by_maybe') ORDER BY count;
SELECT sb_flush(NULL, 'by_maybe');
SELECT wait_until('EXISTS (SELECT FROM told)');
SELECT key IS NULL AS is_null, counter FROM told;
SELECT sb_drain('by_maybe');
SELECT key IS NULL AS is_null, counter FROM told ORDER BY n; TRUNCATE told;

-- NOT NULL forbids it from then on.  A null that is held already stays.
SELECT sb_increment(NULL, 5, 'by_maybe');
ALTER FOREIGN TABLE by_maybe ALTER key SET NOT NULL;
SELECT sb_increment(NULL, 1, 'by_maybe');
SELECT * FROM by_maybe;
SELECT sb_drain('by_maybe');
SELECT key IS NULL AS is_null, counter FROM told; TRUNCATE told;
DROP FOREIGN TABLE by_maybe;
CREATE FOREIGN TABLE by_maybe (a int, b int, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (interval '1h', timeout '1h');
SELECT sb_increment(ROW(NULL, 3), 5, 'by_maybe');
ALTER FOREIGN TABLE by_maybe ALTER a SET NOT NULL, ALTER b SET NOT NULL;
SELECT * FROM by_maybe;
SELECT key, count FROM sb_keys('by_maybe');
DROP FOREIGN TABLE by_maybe;

--
-- several key columns
--
CREATE TABLE told_many (post int, lang text, tag text, counter bigint);
CREATE FUNCTION tell_many(post int, lang varchar, tag text, counter bigint)
RETURNS void LANGUAGE sql
AS 'INSERT INTO told_many VALUES (post, lang, tag, counter)';
CREATE FOREIGN TABLE by_many
  (post int NOT NULL, lang varchar(2) NOT NULL, tag text,
   n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_many', interval '1h', timeout '1h');
SELECT sb_increment(ROW(7, 'en', 'x'), buffer => 'by_many');
SELECT sb_increment(ROW(7::bigint, 'en'::text, 'x'::varchar), 2, 'by_many');
SELECT sb_increment((7, 'en', 'x'), 4, 'by_many');
SELECT sb_increment(ROW('7', 'en', 'x'), 8, 'by_many');
SELECT sb_async_increment(ROW(7, 'en', 'x'), 16, 'by_many');
INSERT INTO by_many VALUES (7, 'en', 'x', 32);
INSERT INTO by_many (tag, lang, post) VALUES ('x', 'en', 7);
SELECT sb_increment(ROW(7, 'en', NULL), 100, 'by_many');
SELECT sb_increment(ROW(7, 'en', ''), 200, 'by_many');
SELECT sb_increment(ROW(7, 'de', 'x'), 300, 'by_many');
-- a row of a table is a key, too
CREATE TABLE seen (post bigint, gone int, lang text, tag name);
ALTER TABLE seen DROP gone;
INSERT INTO seen VALUES (8, 'fr', 'y'), (9, 'it', NULL);
SELECT sb_increment(seen, 400, 'by_many') FROM seen;
SELECT * FROM by_many ORDER BY n, post;
SELECT sb_count(ROW(7, 'en', 'x'), 'by_many') AS x,
       sb_count(ROW(7, 'en', NULL), 'by_many') AS null_tag,
       sb_count(ROW(7, 'en', 'z'), 'by_many') AS none;
SELECT key, count FROM sb_keys('by_many') ORDER BY count, key;
SELECT sb_flush(ROW(7, 'de', 'x'), 'by_many');
SELECT wait_until('EXISTS (SELECT FROM told_many)');
TABLE told_many;
SELECT sb_drain('by_many');
SELECT * FROM told_many ORDER BY counter, post;
-- Too few, too many, none at all, not a row, and a null in the wrong place.
SELECT sb_increment(ROW(7, 'en'), buffer => 'by_many');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_increment(ROW(7, 'en', 'x', 1), buffer => 'by_many');
SELECT sb_increment(ROW(), buffer => 'by_many');
SELECT sb_increment('7', buffer => 'by_many');
\echo :LAST_ERROR_SQLSTATE
-- The text form of a row will do: drivers pass parameters as text.
BEGIN;
SELECT count(*) FROM (VALUES ('(7,en,x)'), (' (7,"en",)'), ('(8,it,"a ""b""")'), ('(7,en,x)')) AS v (k), sb_increment(k, buffer => 'by_many');
SELECT * FROM by_many ORDER BY 1, 2, 3, 4;
SELECT sb_count('(7,en,x)', 'by_many'), sb_count(ROW(8, 'it', 'a "b"'), 'by_many');
SAVEPOINT s;
SELECT sb_increment('(7,en', buffer => 'by_many');
ROLLBACK TO s;
SELECT sb_increment('(7,en)', buffer => 'by_many');
ROLLBACK TO s;
SELECT sb_increment('(seven,en,x)', buffer => 'by_many');
ROLLBACK TO s;
SELECT sb_increment('(,en,x)', buffer => 'by_many');
ROLLBACK;
-- A row of parameters will not, as their types are not known.
PREPARE by_row AS SELECT sb_increment(ROW($1, $2, $3), buffer => 'by_many');
\echo :LAST_ERROR_SQLSTATE
BEGIN;
PREPARE by_text AS SELECT sb_increment($1, buffer => 'by_many');
PREPARE by_insert AS INSERT INTO by_many VALUES ($1, $2, $3);
EXECUTE by_text('(7,en,x)');
EXECUTE by_insert(7, 'en', 'x');
SELECT * FROM by_many;
ROLLBACK;
DEALLOCATE by_text;
DEALLOCATE by_insert;
SELECT sb_increment(7, buffer => 'by_many');
SELECT sb_increment(NULL, buffer => 'by_many');
SELECT sb_increment(NULL::seen, buffer => 'by_many');
SELECT sb_increment(ROW(NULL, 'en', 'x'), buffer => 'by_many');
\echo :LAST_ERROR_SQLSTATE
INSERT INTO by_many VALUES (7, NULL, 'x', 1);
SELECT sb_increment(ROW(7, 'eng', 'x'), buffer => 'by_many');
SELECT sb_increment(ROW('seven', 'en', 'x'), buffer => 'by_many');
SELECT sb_increment(ROW(true, 'en', 'x'), buffer => 'by_many');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_count(ROW(7, 'en'), 'by_many');
SELECT sb_flush(ROW(7, 'en'), 'by_many');
SELECT * FROM by_many;

-- As long as nothing is counted, key columns may come and go.
ALTER FOREIGN TABLE by_many DROP lang;
ALTER FOREIGN TABLE by_many DROP n, ADD lang text, ADD m bigint NOT NULL DEFAULT 1;
CREATE FUNCTION tell_many(post int, tag text, lang text, counter bigint)
RETURNS void LANGUAGE sql
AS 'INSERT INTO told_many VALUES (post, lang, tag, counter)';
SELECT sb_increment(ROW(1, 'tag', 'lang'), 5, 'by_many');
INSERT INTO by_many VALUES (1, 'tag', 'lang');
SELECT * FROM by_many;
TRUNCATE told_many;
SELECT sb_drain('by_many');
TABLE told_many;
-- Counts of keys that cannot be converted stay apart.  New ones are counted with
-- the new columns.  (See convert.sql for keys that can.)
TRUNCATE told_many;
SELECT sb_increment(ROW(1, 'tag', 'lang'), 5, 'by_many');
ALTER FOREIGN TABLE by_many ALTER post TYPE date;
SELECT * FROM by_many;
SELECT sb_count(ROW('2026-11-28', 'tag', 'lang'), 'by_many');
SELECT sb_increment(ROW('2026-11-28', 'tag', 'lang'), 50, 'by_many');
SELECT * FROM by_many;
-- With the columns as they were, they are stored.
ALTER FOREIGN TABLE by_many ALTER post TYPE int;
SELECT sb_flush_all('by_many') > 0 AS asked;
SELECT wait_until('EXISTS (SELECT FROM told_many)');
TABLE told_many;
ALTER FOREIGN TABLE by_many ALTER post TYPE date;
SELECT * FROM by_many;
-- Or they are discarded.
ALTER FOREIGN TABLE by_many ALTER post TYPE int;
TRUNCATE by_many;
SELECT * FROM by_many;
ALTER FOREIGN TABLE by_many ALTER post TYPE date;
SELECT * FROM by_many;
SELECT sb_increment(ROW('2026-11-29', 'tag', 'lang'), 6, 'by_many');
SELECT * FROM by_many;
DROP FOREIGN TABLE by_many;
DROP FUNCTION tell_many(int, varchar, text, bigint),
  tell_many(int, text, text, bigint);

-- Nearly as many columns as a function may have arguments.
SELECT string_agg(format('k%s int', i), ', ' ORDER BY i) AS ninety_columns
  FROM generate_series(1, 90) AS i
\gset
CREATE FUNCTION tell_ninety(:ninety_columns, counter bigint) RETURNS void
LANGUAGE sql
AS 'INSERT INTO told (key, counter) VALUES (k1 || ''-'' || k90, counter)';
CREATE FOREIGN TABLE by_ninety (:ninety_columns, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_ninety', interval '1h');
INSERT INTO by_ninety (k1, k90) VALUES (1, 90), (1, 90), (2, 90);
SELECT k1, k89, k90, n FROM by_ninety ORDER BY k1;
SELECT sb_drain('by_ninety');
SELECT key, counter FROM told ORDER BY n; TRUNCATE told;
DROP FOREIGN TABLE by_ninety;
DROP FUNCTION tell_ninety;

--
-- A key's stored form takes up to 2000 bytes.  A long text has 4 of them
-- before it.
--
CREATE FUNCTION tell_length(key text, counter bigint) RETURNS void
LANGUAGE sql AS 'INSERT INTO told (key, counter) VALUES (length(key), counter)';
CREATE FOREIGN TABLE by_long (key text, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell_length', interval '1h');
SELECT sb_increment(repeat('x', 1996), 1, 'by_long');
SELECT sb_increment(ROW(repeat('x', 1996)), 2, 'by_long');
INSERT INTO by_long VALUES (repeat('x', 1996), 4);
SELECT sb_increment(repeat('x', 1997), 1, 'by_long');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_increment(ROW(repeat('x', 1997)), 1, 'by_long');
SELECT sb_async_increment(repeat('x', 1997), 1, 'by_long');
INSERT INTO by_long VALUES (repeat('x', 1997));
SELECT sb_count(repeat('x', 1997), 'by_long');
SELECT sb_increment(repeat('x', 10000000), 1, 'by_long');
-- lengths around which the stored form changes
SELECT sb_increment(repeat('x', i), i, 'by_long')
  FROM unnest(ARRAY[125, 126, 127, 128, 129]) AS i;
SELECT length(key), n FROM by_long ORDER BY length(key);
SELECT sb_count(repeat('x', 1996), 'by_long');
SELECT sb_drain('by_long');
SELECT key, counter FROM told ORDER BY key::int; TRUNCATE told;
-- What is compressed or out of line in a table is the same key as what is not.
CREATE TABLE texts (t text);
INSERT INTO texts VALUES (repeat('x', 1500)), (repeat('xy', 900));
INSERT INTO texts SELECT repeat('x', 10000);
SELECT sb_increment(t, 1, 'by_long') FROM texts WHERE length(t) < 2000;
SELECT sb_increment(repeat('x', 1500), 2, 'by_long');
SELECT sb_increment(repeat('xy', 900), 2, 'by_long');
SELECT sb_increment(t, 1, 'by_long') FROM texts WHERE length(t) > 2000;
SELECT length(key), n FROM by_long ORDER BY length(key);
DROP FOREIGN TABLE by_long;

-- Two columns: the sum of both counts.
CREATE FOREIGN TABLE by_two_long (a text, b int NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'tell', interval '1h');
SELECT sb_increment(ROW(repeat('x', 1992), 1), 1, 'by_two_long');
SELECT sb_increment(ROW(repeat('x', 1993), 1), 1, 'by_two_long');
INSERT INTO by_two_long VALUES (repeat('x', 1992), 1);
INSERT INTO by_two_long VALUES (repeat('x', 1993), 1);
SELECT length(a), b, n FROM by_two_long;
DROP FOREIGN TABLE by_two_long;

DROP TABLE told, told_many, seen, places, texts;
DROP TYPE place;
DROP DOMAIN even, small_tags, price;
DROP FUNCTION tell, tell_any, tell_length;
