-- What the fuzz test calls with dev/fuzz --ddl: functions that alter what the
-- statement they are called in works with, between two of its calls.  What they
-- are called as: casts, checks of domains, defaults, triggers, handlers, orders
-- of keys.  See FuzzCalls.pm.
--
-- All that is altered is named d_*, and made again by d_make().  The buffers
-- b_rows and d_* are counted in; what b_rows is given is in the ledger, too.

CREATE TABLE strikes (statement text NOT NULL);
GRANT SELECT ON strikes TO PUBLIC;

-- %T a row type, %P a row type that is not a session's own, %B a buffer, %Y the
-- type of an attribute or column, %R a role, %K a key column

INSERT INTO strikes VALUES
	('ALTER TYPE %T ADD ATTRIBUTE c %Y CASCADE'),
	('ALTER TYPE %T DROP ATTRIBUTE IF EXISTS c CASCADE'),
	('ALTER TYPE %T DROP ATTRIBUTE IF EXISTS b CASCADE'),
	('ALTER TYPE %T ADD ATTRIBUTE b %Y CASCADE'),
	('ALTER TYPE %T ALTER ATTRIBUTE a TYPE %Y CASCADE'),
	('ALTER TYPE %T ALTER ATTRIBUTE a TYPE text CASCADE'),
	('ALTER TYPE %T ALTER ATTRIBUTE b TYPE %Y CASCADE'),
	('ALTER TYPE %T ALTER ATTRIBUTE b TYPE bigint CASCADE'),
	('ALTER TYPE %T RENAME ATTRIBUTE a TO z CASCADE'),
	('ALTER TYPE %T RENAME ATTRIBUTE z TO a CASCADE'),
	('ALTER TYPE %T OWNER TO %R'),
	('ALTER TYPE %T RENAME TO d_renamed'),
	('DROP TYPE %T CASCADE'),
	('DROP TYPE IF EXISTS %T, d_renamed CASCADE; CREATE TYPE %T AS (a %Y, b %Y)'),
	('DROP TYPE IF EXISTS %T CASCADE; CREATE TYPE %T AS (a text, b bigint)'),
	('CREATE TYPE %T AS (a text, b bigint)'),
	('ALTER DOMAIN d_domain DROP CONSTRAINT IF EXISTS checked'),
	('ALTER DOMAIN d_domain ADD CONSTRAINT checked CHECK (d_check(VALUE::text)) NOT VALID'),
	('DROP DOMAIN d_domain CASCADE; CREATE DOMAIN d_domain AS bigint'),
	('DROP DOMAIN d_domain CASCADE; CREATE DOMAIN d_domain AS text CHECK (d_check(VALUE))'),
	('ALTER DOMAIN d_row_domain SET NOT NULL'),
	('ALTER DOMAIN d_row_domain DROP NOT NULL'),
	('DROP DOMAIN IF EXISTS d_row_domain CASCADE; CREATE DOMAIN d_row_domain AS %P CHECK (d_check(VALUE::text))'),
	('ALTER TYPE d_enum RENAME VALUE ''sad'' TO ''glum'''),
	('ALTER TYPE d_enum RENAME VALUE ''glum'' TO ''sad'''),
	('ALTER TYPE d_enum ADD VALUE IF NOT EXISTS ''mad'''),
	('DROP TYPE d_enum CASCADE; CREATE TYPE d_enum AS ENUM (''sad'', ''glad'')'),
	('DROP CAST IF EXISTS (d_source AS text); CREATE CAST (d_source AS text) WITH FUNCTION d_to_text(d_source) AS ASSIGNMENT'),
	('DROP CAST IF EXISTS (d_source AS text); CREATE CAST (d_source AS text) WITH INOUT AS ASSIGNMENT'),
	('DROP CAST IF EXISTS (d_source AS bigint); CREATE CAST (d_source AS bigint) WITH FUNCTION d_to_bigint(d_source) AS ASSIGNMENT'),
	('DROP CAST IF EXISTS (d_source AS bigint)'),
	('DROP CAST IF EXISTS (%T AS text); CREATE CAST (%T AS text) WITH INOUT AS ASSIGNMENT'),
	('DROP CAST IF EXISTS (bigint AS d_ordered); CREATE CAST (bigint AS d_ordered) WITH INOUT AS ASSIGNMENT'),
	('ALTER FOREIGN TABLE %B RENAME COLUMN %K TO z'),
	('ALTER FOREIGN TABLE %B RENAME COLUMN z TO %K'),
	('ALTER FOREIGN TABLE %B RENAME COLUMN n TO m'),
	('ALTER FOREIGN TABLE %B RENAME COLUMN m TO n'),
	('ALTER FOREIGN TABLE %B ALTER COLUMN %K TYPE %Y'),
	('ALTER FOREIGN TABLE %B ALTER COLUMN %K TYPE text'),
	('ALTER FOREIGN TABLE %B ALTER COLUMN n TYPE int'),
	('ALTER FOREIGN TABLE %B ALTER COLUMN n TYPE bigint'),
	('ALTER FOREIGN TABLE %B ALTER COLUMN %K SET NOT NULL'),
	('ALTER FOREIGN TABLE %B ALTER COLUMN %K DROP NOT NULL'),
	('ALTER FOREIGN TABLE %B ALTER COLUMN %K SET DEFAULT d_text()'),
	('ALTER FOREIGN TABLE %B ALTER COLUMN n SET DEFAULT d_number()'),
	('ALTER FOREIGN TABLE %B ALTER COLUMN %K SET STORAGE PLAIN'),
	('ALTER FOREIGN TABLE %B ADD COLUMN c %Y'),
	('ALTER FOREIGN TABLE %B DROP COLUMN %K CASCADE'),
	('ALTER FOREIGN TABLE %B DROP COLUMN c CASCADE'),
	('ALTER FOREIGN TABLE %B RENAME TO d_other'),
	('ALTER FOREIGN TABLE d_other RENAME TO %B'),
	('ALTER FOREIGN TABLE %B SET SCHEMA other'),
	('ALTER FOREIGN TABLE other.%B SET SCHEMA public'),
	('ALTER FOREIGN TABLE %B OWNER TO %R'),
	('ALTER FOREIGN TABLE %B OPTIONS (SET handler ''d_take'')'),
	('ALTER FOREIGN TABLE %B OPTIONS (SET handler ''take'')'),
	('ALTER FOREIGN TABLE %B OPTIONS (SET interval ''0'')'),
	('ALTER FOREIGN TABLE %B OPTIONS (SET interval ''1h'')'),
	('ALTER FOREIGN TABLE %B OPTIONS (SET durable ''false'')'),
	('ALTER FOREIGN TABLE %B OPTIONS (SET durable ''true'')'),
	('DROP FOREIGN TABLE %B CASCADE'),
	('TRUNCATE %B'),
	('SELECT sb_flush_all(''%B'')'),
	('SELECT sb_stop(''%B'')'),
	('SELECT sb_start(''%B'')'),
	('SELECT sb_increment(ROW(''struck'', 1), 1, ''%B'')'),
	('SELECT sb_async_increment(''struck'', 1, ''%B'')'),
	('SELECT count(*) FROM sb_keys(''%B'')'),
	('SELECT count(k::text) FROM %B k'),
	('REVOKE ALL ON %B FROM PUBLIC, %R'),
	('GRANT INSERT, SELECT ON %B TO PUBLIC, %R'),
	('GRANT INSERT ON %B TO %R'),
	('REVOKE SELECT ON %B FROM %R'),
	('REVOKE INSERT ON %B FROM %R'),
	('REVOKE fuzz_reader FROM fuzz_writer'),
	('GRANT fuzz_reader TO fuzz_writer'),
	('ALTER FOREIGN TABLE b_rows RENAME COLUMN a TO z'),
	('ALTER FOREIGN TABLE b_rows RENAME COLUMN z TO a'),
	('REVOKE INSERT ON b_rows FROM %R'),
	('GRANT INSERT ON b_rows TO %R'),
	('ALTER TABLE d_liked RENAME COLUMN a TO z'),
	('ALTER TABLE d_liked RENAME COLUMN z TO a'),
	('ALTER TABLE d_liked ALTER COLUMN a TYPE %Y'),
	('ALTER TABLE d_liked DROP COLUMN IF EXISTS b, ADD COLUMN b %Y'),
	('CREATE OR REPLACE TRIGGER counted AFTER INSERT OR UPDATE OR DELETE ON d_liked'
	 ' FOR EACH ROW EXECUTE FUNCTION sb_trigger(''%B'', ''a'')'),
	('CREATE OR REPLACE TRIGGER pair AFTER INSERT OR UPDATE OR DELETE ON d_liked'
	 ' FOR EACH ROW EXECUTE FUNCTION sb_trigger(''%B'', ''a'', ''b'')'),
	('ALTER FUNCTION d_take(anyelement, bigint) RENAME TO d_not_taken'),
	('ALTER FUNCTION d_not_taken(anyelement, bigint) RENAME TO d_take'),
	('CREATE OR REPLACE FUNCTION d_take(anyelement, bigint) RETURNS void LANGUAGE sql AS ''SELECT d_strike(30)'''),
	('ANALYZE pg_type'),
	('SELECT d_make()');

CREATE FUNCTION d_pick(VARIADIC choices text[]) RETURNS text LANGUAGE sql VOLATILE AS $$
	SELECT choices[1 + floor(random() * cardinality(choices))]
$$;

-- with the rights of a superuser, whoever's statement it is in; what it is
-- refused is not of interest
--
-- PostgreSQL itself misreads a row that was made before an attribute got another
-- type, or crashes, unless it has the setting composite_type_mismatch: see
-- doc/security.md.  Where it has not, and such rows may be `held', by the
-- statement or by another session, no attribute gets one.

CREATE FUNCTION d_strike_now(type text, buffer text, held boolean) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET fuzz.striking = 'yes' AS $$
DECLARE
	strike text;
BEGIN
	SELECT statement INTO strike FROM public.strikes
	WHERE (type IS NULL OR statement LIKE '%\%T%') AND (buffer IS NULL OR statement LIKE '%\%B%')
		AND (NOT held OR statement NOT LIKE '% ALTER ATTRIBUTE %' OR current_setting('composite_type_mismatch', true) IS NOT NULL)
	ORDER BY random() LIMIT 1;
	strike := replace(strike, '%T', coalesce(type, public.d_pick('d_row', 'd_row', 'd_second', 'pg_temp.d_temp', 'other.d_else')));
	strike := replace(strike, '%P', public.d_pick('d_row', 'd_row', 'd_second', 'other.d_else'));
	strike := replace(strike, '%B', coalesce(buffer,
		public.d_pick('d_pair', 'd_pair', 'd_single', 'd_composite', 'd_checked', 'd_sorted', 'd_mixed')));
	strike := replace(strike, '%K', public.d_pick('a', 'a', 'b'));
	strike := replace(strike, '%R', public.d_pick('fuzz_owner', 'fuzz_writer', 'fuzz_reader', 'SESSION_USER'));
	WHILE strike LIKE '%\%Y%' LOOP
		strike := regexp_replace(strike, '%Y', public.d_pick('text', 'bigint', 'int', 'smallint', 'numeric', 'boolean', '"char"',
			'float8', 'int[]', 'text[]', 'bytea', 'uuid', 'jsonb', 'd_domain', 'd_enum', 'comp', 'int4multirange', 'name'));
	END LOOP;
	EXECUTE strike;
EXCEPTION WHEN OTHERS THEN
	NULL;
END $$;

-- anything, or of this type or buffer

CREATE FUNCTION d_strike(percent int, type text DEFAULT NULL, buffer text DEFAULT NULL, held boolean DEFAULT true) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
	IF random() * 100 < percent AND coalesce(current_setting('fuzz.striking', true), '') <> 'yes' THEN
		PERFORM public.d_strike_now(type, buffer, held);
	END IF;
END $$;

-- A function that is said to be immutable may do it, too: in what it calls.

CREATE FUNCTION d_check(value text) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
	PERFORM public.d_strike(40);
	RETURN true;
END $$;

CREATE FUNCTION d_text() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	PERFORM public.d_strike(40);
	RETURN 'd' || floor(random() * 5);
END $$;

CREATE FUNCTION d_number() RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
	PERFORM public.d_strike(40);
	RETURN 1 + floor(random() * 5);
END $$;

-- A row of one of the types, whatever its attributes are by now: 7 is a value of
-- most.  Rows of d_temp are the session's own, are made nowhere else and are gone
-- after the call that they are an argument of, so before the next is made none is
-- held.

-- It is made by record_in(), of which PL/pgSQL only knows that it returns a
-- record: the plan of an expression of a certain row type would be kept, and would
-- fail for all others.

CREATE FUNCTION d_row_of(type text) RETURNS record LANGUAGE plpgsql AS $$
DECLARE
	row_type oid;
	sevens text;
	r record;
BEGIN
	PERFORM public.d_strike(20, type, held => type <> 'pg_temp.d_temp');
	SELECT CASE typtype WHEN 'd' THEN typbasetype ELSE oid END INTO STRICT row_type
		FROM pg_type WHERE oid = type::regtype;
	SELECT string_agg('7', ',') INTO sevens
		FROM pg_attribute
		WHERE attrelid = (SELECT typrelid FROM pg_type WHERE oid = row_type) AND attnum > 0 AND NOT attisdropped;
	r := record_in(('(' || sevens || ')')::cstring, row_type, -1);
	PERFORM public.d_strike(20, type);
	RETURN r;
END $$;

-- A type whose values cannot be had but from text, with casts and an order.

CREATE TYPE d_ordered;
CREATE FUNCTION d_ordered_in(cstring) RETURNS d_ordered LANGUAGE internal IMMUTABLE STRICT AS 'textin';
CREATE FUNCTION d_ordered_out(d_ordered) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout';
CREATE TYPE d_ordered (INPUT = d_ordered_in, OUTPUT = d_ordered_out, LIKE = text);
CREATE CAST (d_ordered AS text) WITHOUT FUNCTION;

CREATE FUNCTION d_compare(d_ordered, d_ordered) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
	PERFORM public.d_strike(20);
	RETURN bttextcmp($1::text, $2::text);
END $$;
CREATE FUNCTION d_less(d_ordered, d_ordered) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
	PERFORM public.d_strike(20);
	RETURN bttextcmp($1::text, $2::text) < 0;
END $$;
CREATE OPERATOR <<< (LEFTARG = d_ordered, RIGHTARG = d_ordered, FUNCTION = d_less);
CREATE OPERATOR CLASS d_ordered_ops DEFAULT FOR TYPE d_ordered USING btree AS OPERATOR 1 <<<, FUNCTION 1 d_compare(d_ordered, d_ordered);

CREATE TYPE d_source AS (v text);

CREATE FUNCTION d_to_text(d_source) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
	PERFORM public.d_strike(40);
	RETURN ($1).v;
END $$;

CREATE FUNCTION d_to_bigint(d_source) RETURNS bigint LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
	PERFORM public.d_strike(40);
	RETURN length(($1).v);
END $$;

-- handlers

CREATE FUNCTION d_take_array(keys anyarray, counts bigint[]) RETURNS void LANGUAGE sql AS 'SELECT public.d_strike(30)';

CREATE FUNCTION d_take_pair(a text, b bigint, n bigint) RETURNS void LANGUAGE sql AS 'SELECT public.d_strike(30)';

CREATE FUNCTION take_rows(a text[], b bigint[], counts bigint[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
	PERFORM public.d_strike(20);
	INSERT INTO public.stored SELECT 'rows', sum(c) FROM unnest(counts) c;
	PERFORM public.d_strike(20);
END $$;

CREATE FUNCTION d_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	PERFORM public.d_strike(30);
	RETURN NEW;
END $$;

-- Makes what there is not, or has another shape by now.

CREATE FUNCTION d_make() RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $make$
DECLARE
	statement text;
BEGIN
	FOREACH statement IN ARRAY ARRAY[
		'CREATE TYPE d_row AS (a text, b bigint)',
		'CREATE TYPE d_second AS (a int, b text)',
		'CREATE TYPE other.d_else AS (a text, b int)',
		'CREATE TYPE pg_temp.d_temp AS (a text, b bigint)',
		'CREATE DOMAIN d_domain AS text CHECK (d_check(VALUE))',
		'CREATE DOMAIN d_row_domain AS d_row CHECK (d_check(VALUE::text))',
		'CREATE TYPE d_enum AS ENUM (''sad'', ''glad'')',
		'CREATE CAST (d_source AS text) WITH FUNCTION d_to_text(d_source) AS ASSIGNMENT',
		'CREATE CAST (d_source AS bigint) WITH FUNCTION d_to_bigint(d_source) AS ASSIGNMENT',
		'CREATE CAST (text AS d_ordered) WITHOUT FUNCTION AS ASSIGNMENT',
		$$CREATE FUNCTION d_take(anyelement, bigint) RETURNS void LANGUAGE sql AS 'SELECT public.d_strike(30)'$$,
		$$CREATE FUNCTION d_named() RETURNS d_row LANGUAGE plpgsql AS 'BEGIN PERFORM public.d_strike(30); RETURN ROW(7, 7); END'$$,
		$$CREATE FOREIGN TABLE d_pair (a text, b bigint, n bigint DEFAULT 1) SERVER statbuffer
			OPTIONS (handler 'd_take_pair', interval '100ms', backoff '50ms')$$,
		$$CREATE FOREIGN TABLE d_single (a text DEFAULT d_text(), n bigint DEFAULT d_number()) SERVER statbuffer
			OPTIONS (handler 'd_take', interval '100ms', backoff '50ms', durable 'true')$$,
		$$CREATE FOREIGN TABLE d_composite (a d_row, n bigint DEFAULT 1) SERVER statbuffer
			OPTIONS (handler 'd_take', interval '100ms', backoff '50ms')$$,
		$$CREATE FOREIGN TABLE d_checked (a d_domain, n bigint DEFAULT 1) SERVER statbuffer
			OPTIONS (handler 'd_take_array', interval '100ms', backoff '50ms', durable 'true')$$,
		$$CREATE FOREIGN TABLE d_sorted (a d_ordered, n bigint DEFAULT 1) SERVER statbuffer
			OPTIONS (handler 'd_take', interval '100ms', backoff '50ms')$$,
		$$CREATE FOREIGN TABLE d_mixed (a d_row_domain, b d_enum, n bigint DEFAULT 1) SERVER statbuffer
			OPTIONS (handler 'd_not_there', interval '100ms', backoff '50ms')$$,
		'CREATE TRIGGER b BEFORE INSERT ON d_pair FOR EACH ROW EXECUTE FUNCTION d_before()',
		'CREATE TABLE d_liked (a d_source, b d_source, other text)',
		$$CREATE TRIGGER pair AFTER INSERT OR UPDATE OR DELETE ON d_liked FOR EACH ROW EXECUTE FUNCTION sb_trigger('d_pair', 'a', 'b')$$,
		$$CREATE TRIGGER counted AFTER INSERT OR UPDATE OR DELETE ON d_liked FOR EACH ROW EXECUTE FUNCTION sb_trigger('d_single', 'a')$$,
		'GRANT ALL ON d_pair, d_single, d_composite, d_checked, d_sorted, d_mixed, d_liked TO PUBLIC',
		'ALTER FOREIGN TABLE d_single OWNER TO fuzz_owner']
	LOOP
		BEGIN
			EXECUTE statement;
		EXCEPTION WHEN OTHERS THEN
			NULL;
		END;
	END LOOP;
END $make$;

-- All of it anew

CREATE FUNCTION d_remake() RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
	statement text;
BEGIN
	FOREACH statement IN ARRAY ARRAY[
		'DROP FOREIGN TABLE IF EXISTS d_pair, d_single, d_composite, d_checked, d_sorted, d_mixed, d_other CASCADE',
		'DROP FOREIGN TABLE IF EXISTS other.d_pair, other.d_single, other.d_composite, other.d_checked, other.d_sorted, other.d_mixed CASCADE',
		'DROP TABLE IF EXISTS d_liked CASCADE',
		'DROP TYPE IF EXISTS d_row, d_second, other.d_else, d_renamed, pg_temp.d_temp CASCADE',
		'DROP DOMAIN IF EXISTS d_domain, d_row_domain CASCADE',
		'DROP TYPE IF EXISTS d_enum CASCADE']
	LOOP
		BEGIN
			EXECUTE statement;
		EXCEPTION WHEN OTHERS THEN
			NULL;
		END;
	END LOOP;
	PERFORM public.d_make();
END $$;

CREATE FOREIGN TABLE b_rows (a text, b bigint, n bigint NOT NULL DEFAULT 1) SERVER statbuffer
	OPTIONS (handler 'take_rows', interval '100ms', backoff '20ms');
GRANT ALL ON b_rows TO PUBLIC;
SELECT d_make();
