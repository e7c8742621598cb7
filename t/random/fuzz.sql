-- What the fuzz test calls besides buffers: types, handlers and other functions
-- that mean no good, and relations that are no buffers.  See FuzzCalls.pm.

GRANT ALL ON SCHEMA public TO PUBLIC;
GRANT USAGE ON FOREIGN SERVER statbuffer TO fuzz_owner, fuzz_nologin;
CREATE SCHEMA other;
CREATE SCHEMA evil;
GRANT ALL ON SCHEMA other, evil TO PUBLIC;
CREATE UNLOGGED TABLE ledger (key text, n bigint);
CREATE UNLOGGED TABLE stored (key text, n bigint);
CREATE UNLOGGED TABLE taken (keys bigint, n numeric);
CREATE TABLE mood (failing float8, rude boolean);
INSERT INTO mood VALUES (0.05, true);
CREATE SEQUENCE begun;
CREATE SEQUENCE ended;
CREATE TABLE hot_rows (id int PRIMARY KEY, n bigint NOT NULL);
INSERT INTO hot_rows VALUES (0, 0), (1, 0), (2, 0);
CREATE TABLE a_table (n int);
INSERT INTO a_table SELECT generate_series(1, 100);
CREATE INDEX a_index ON a_table (n);
CREATE VIEW a_view AS SELECT * FROM a_table;
CREATE SEQUENCE a_sequence;
CREATE TABLE a_partitioned (key text, n bigint) PARTITION BY LIST (key);
CREATE TABLE a_partition PARTITION OF a_partitioned FOR VALUES IN ('y');
CREATE TABLE s_parent (key text, n bigint);
CREATE FOREIGN DATA WRAPPER nothing;
CREATE SERVER nowhere FOREIGN DATA WRAPPER nothing;
CREATE FOREIGN TABLE a_foreign (key text, n bigint) SERVER nowhere;

-- types

CREATE TYPE mood_t AS ENUM ('sad', 'glad');
CREATE TYPE comp AS (a int, b text, c int[]);
CREATE TYPE shifty AS (a int, b text);
CREATE TYPE nested AS (a comp, b comp[]);
CREATE TABLE holed (gone int, a int, also_gone text, b text);
ALTER TABLE holed DROP COLUMN gone, DROP COLUMN also_gone;
INSERT INTO holed VALUES (1, 'in a table');
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE DOMAIN never_null AS text NOT NULL;
CREATE DOMAIN few AS int[] CHECK (cardinality(VALUE) < 4);
CREATE DOMAIN some_comp AS comp CHECK ((VALUE).a > 0);
CREATE DOMAIN fleeting AS int CHECK (VALUE > 0);
CREATE DOMAIN counted_bigint AS bigint;
CREATE TABLE toasted (id int, t text, b bytea, j jsonb, a int[], c comp);
ALTER TABLE toasted ALTER b SET STORAGE EXTERNAL;
INSERT INTO toasted VALUES
	(1, repeat('compressed ', 150), decode(repeat('ab', 1900), 'hex'),
	 jsonb_build_object('k', repeat('j', 1800)), array_fill(7, ARRAY[400]), ROW(1, repeat('c', 1500), ARRAY[1])),
	(2, repeat('much too long ', 100000), NULL, NULL, NULL, NULL);
INSERT INTO toasted (id, t) SELECT 3, string_agg(md5(i::text), '') FROM generate_series(1, 60) i;
CREATE TYPE moody;
CREATE FUNCTION moody_in(cstring) RETURNS moody LANGUAGE internal IMMUTABLE STRICT AS 'textin';
CREATE FUNCTION moody_out(moody) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout';
CREATE TYPE moody (INPUT = moody_in, OUTPUT = moody_out, LIKE = text);
CREATE CAST (text AS moody) WITHOUT FUNCTION AS ASSIGNMENT;
CREATE TYPE unordered;
CREATE FUNCTION unordered_in(cstring) RETURNS unordered LANGUAGE internal IMMUTABLE STRICT AS 'textin';
CREATE FUNCTION unordered_out(unordered) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout';
CREATE TYPE unordered (INPUT = unordered_in, OUTPUT = unordered_out, LIKE = text);

-- one that cannot be shown

CREATE TYPE fragile;
CREATE FUNCTION fragile_in(cstring) RETURNS fragile LANGUAGE internal IMMUTABLE STRICT AS 'textin';
CREATE FUNCTION fragile_out(fragile) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'shell_out';
CREATE TYPE fragile (INPUT = fragile_in, OUTPUT = fragile_out, LIKE = text);

-- one whose order fails now and then, and is never the same

CREATE CAST (moody AS text) WITHOUT FUNCTION;

CREATE FUNCTION moody_cmp(moody, moody) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
	IF random() < 0.05 THEN
		RAISE 'cannot compare';
	END IF;
	RETURN floor(random() * 3) - 1;
END $$;
CREATE OPERATOR CLASS moody_ops DEFAULT FOR TYPE moody USING btree AS FUNCTION 1 moody_cmp(moody, moody);
CREATE TYPE text_range AS RANGE (SUBTYPE = text, COLLATION = "C");

-- handlers

CREATE FUNCTION in_the_mood() RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
	m public.mood;
BEGIN
	SELECT * INTO m FROM public.mood;
	IF random() < m.failing THEN
		CASE floor(random() * 10)::int
			WHEN 0 THEN RAISE 'not in the mood';
			WHEN 1 THEN RAISE 'as if deadlocked' USING ERRCODE = 'deadlock_detected';
			WHEN 2 THEN RAISE 'as if cancelled' USING ERRCODE = 'query_canceled';
			WHEN 3 THEN RAISE '%', repeat(chr(233), 700);
			WHEN 4 THEN PERFORM pg_sleep(0.05);
			WHEN 5 THEN RETURN NULL;
			WHEN 6 THEN RAISE 'as if out of memory' USING ERRCODE = 'out_of_memory', DETAIL = repeat('d', 5000), HINT = '%s%n';
			WHEN 7 THEN RAISE USING MESSAGE = '';
			WHEN 8 THEN PERFORM pg_cancel_backend(pg_backend_pid());
			ELSE RETURN false;
		END CASE;
	END IF;
	RETURN true;
END $$;

CREATE FUNCTION take(keys anyarray, counts bigint[]) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO public.taken SELECT cardinality(keys), sum(c) FROM unnest(counts) c;
	RETURN public.in_the_mood();
END $$;

CREATE FUNCTION take(key anyelement, count bigint) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO public.taken VALUES (1, count);
	RETURN public.in_the_mood();
END $$;

CREATE FUNCTION take_one(key anyelement, count bigint) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	RETURN public.in_the_mood();
END $$;

CREATE FUNCTION take(a int, b text, c bigint) RETURNS boolean LANGUAGE sql AS 'SELECT public.in_the_mood()';

CREATE FUNCTION take(a int[], b text[], c bigint[]) RETURNS boolean LANGUAGE sql AS 'SELECT public.in_the_mood()';

CREATE FUNCTION take(a text, b int, c bigint) RETURNS boolean LANGUAGE sql AS 'SELECT public.in_the_mood()';

CREATE FUNCTION take(a text[], b int[], c bigint[]) RETURNS boolean LANGUAGE sql AS 'SELECT public.in_the_mood()';

CREATE FUNCTION take(text[], date[], numeric[], int[], comp[], boolean[], bigint[]) RETURNS void LANGUAGE sql AS '';

CREATE FUNCTION take(text, date, numeric, int[], comp, boolean, bigint) RETURNS void LANGUAGE sql AS '';

DO $$
BEGIN
	EXECUTE format('CREATE FUNCTION take(%sbigint) RETURNS boolean LANGUAGE sql AS %L',
		repeat('"char", ', 98), 'SELECT public.in_the_mood()');
	EXECUTE format('CREATE FUNCTION take(%sbigint[]) RETURNS boolean LANGUAGE sql AS %L',
		repeat('"char"[], ', 98), 'SELECT public.in_the_mood()');
END $$;

CREATE FUNCTION take_control(keys text[], counts bigint[]) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO public.stored SELECT * FROM unnest(keys, counts);
	RETURN public.in_the_mood();
END $$;

CREATE FUNCTION returns_int(anyelement, bigint) RETURNS int LANGUAGE sql AS 'SELECT 1';

CREATE FUNCTION many_rows(anyelement, bigint) RETURNS SETOF boolean LANGUAGE sql AS 'SELECT true';

CREATE FUNCTION variadic_take(VARIADIC bigint[]) RETURNS void LANGUAGE sql AS '';

CREATE FUNCTION default_take(text, bigint, x int DEFAULT 5) RETURNS void LANGUAGE sql AS '';

CREATE FUNCTION ambiguous(text, real) RETURNS void LANGUAGE sql AS '';

CREATE FUNCTION ambiguous(text, numeric) RETURNS void LANGUAGE sql AS '';

CREATE FUNCTION not_mine(anyelement, bigint) RETURNS void LANGUAGE sql AS '';
ALTER FUNCTION not_mine(anyelement, bigint) OWNER TO fuzz_nobody;

CREATE FUNCTION forbidden(anyelement, bigint) RETURNS void LANGUAGE sql AS '';
REVOKE ALL ON FUNCTION forbidden(anyelement, bigint) FROM PUBLIC;

CREATE FUNCTION an_aggregate_step(int, text, bigint) RETURNS int LANGUAGE sql AS 'SELECT 1';
CREATE AGGREGATE an_aggregate(text, bigint) (SFUNC = an_aggregate_step, STYPE = int);

CREATE PROCEDURE a_procedure(anyelement, bigint) LANGUAGE sql AS '';

CREATE FUNCTION handle_flush(key text, counter bigint) RETURNS void LANGUAGE sql AS '';

CREATE FUNCTION control(k text, c bigint) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
	PERFORM public.sb_increment(k, c, 'public.control');
	INSERT INTO public.ledger VALUES (k, c);
END $$;

CREATE FUNCTION control_async() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
	PERFORM nextval('public.begun');
	PERFORM public.sb_async_increment('async', 1, 'public.control');
	PERFORM nextval('public.ended');
END $$;

-- What people do to a statement.  Internal errors are not for them to hide, nor
-- that memory is out: what a model expects does not hold then.

CREATE FUNCTION try(statement text, depth int) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	IF depth > 0 THEN
		PERFORM public.try(statement, depth - 1);
	END IF;
	EXECUTE statement;
	RETURN 'done';
EXCEPTION
	WHEN internal_error OR out_of_memory THEN
		RAISE;
	WHEN OTHERS THEN
		RETURN SQLSTATE;
END $$;

CREATE FUNCTION nest(statement text, depth int) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
	BEGIN
		IF depth > 0 THEN
			PERFORM public.nest(statement, depth - 1);
		END IF;
		EXECUTE statement;
	EXCEPTION WHEN division_by_zero THEN
		NULL;
	END;
	IF depth % 7 = 3 THEN
		PERFORM 1 / (depth - depth);
	END IF;
END $$;

CREATE FUNCTION as_owner(statement text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
	EXECUTE statement;
END $$;
ALTER FUNCTION as_owner(text) OWNER TO fuzz_owner;

CREATE PROCEDURE in_a_loop(statement text, times int) LANGUAGE plpgsql AS $$
BEGIN
	FOR i IN 1 .. times LOOP
		EXECUTE statement;
		IF i % 2 = 0 THEN
			ROLLBACK;
		ELSE
			COMMIT;
		END IF;
	END LOOP;
END $$;

CREATE FUNCTION expanded(n int) RETURNS int[] LANGUAGE plpgsql AS $$
DECLARE
	a int[] := array_fill(1, ARRAY[n]);
BEGIN
	a[2] := 5;
	RETURN a;
END $$;

CREATE FUNCTION expanded_row() RETURNS comp LANGUAGE plpgsql AS $$
DECLARE
	r public.comp;
BEGIN
	r.a := 1;
	r.c := array_fill(2, ARRAY[3]);
	r.c[2] := 7;
	RETURN r;
END $$;

CREATE FUNCTION expanded_record() RETURNS record LANGUAGE plpgsql AS $$
DECLARE
	r record;
BEGIN
	SELECT 1 AS a, 'x'::text AS b INTO r;
	r.a := 2;
	RETURN r;
END $$;

-- functions that count and say that they do not

CREATE FUNCTION counting(k text) RETURNS text LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
	IF k = 'bad' THEN
		RAISE 'bad';
	END IF;
	PERFORM public.sb_increment(k, 1, 'public.b_text');
	RETURN k;
END $$;
CREATE DOMAIN counted AS text CHECK (counting(VALUE) IS NOT NULL);
CREATE DOMAIN trying AS text CHECK (try('SELECT 1 / 0', 1) IS NOT NULL);
CREATE TABLE contexts (
	a text DEFAULT counting('default') CHECK (counting(a) <> 'never'),
	b text GENERATED ALWAYS AS (counting(left(a, 100))) STORED,
	c counted);
CREATE INDEX ON contexts (counting(left(a, 200)));
CREATE TABLE guarded (a text);
CREATE POLICY p ON guarded USING (counting(a) IS NOT NULL) WITH CHECK (counting(a) <> 'never');
ALTER TABLE guarded ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;

CREATE FUNCTION agg_step(bigint, text) RETURNS bigint LANGUAGE sql AS $$
	SELECT $1 + 1 FROM (SELECT public.sb_increment($2, 1, 'public.b_text')) s
$$;
CREATE AGGREGATE counted_agg(text) (SFUNC = agg_step, STYPE = bigint, INITCOND = '0');
CREATE OPERATOR ## (LEFTARG = text, RIGHTARG = regclass, FUNCTION = sb_count);

CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	PERFORM public.sb_increment('trigger', 1, 'public.b_text');
	IF TG_OP = 'INSERT' AND TG_LEVEL = 'ROW' AND TG_WHEN = 'BEFORE' THEN
		IF random() < 0.1 THEN
			RETURN NULL;
		END IF;
		RETURN NEW;
	END IF;
	IF random() < 0.1 THEN
		INSERT INTO public.s_trigger VALUES ('again', 1);
	END IF;
	RETURN NULL;
END $$;
CREATE TABLE triggered (a text);
CREATE TRIGGER t AFTER INSERT ON triggered REFERENCING NEW TABLE AS news FOR EACH STATEMENT EXECUTE FUNCTION meddle();
CREATE CONSTRAINT TRIGGER d AFTER INSERT ON triggered DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION meddle();

CREATE FUNCTION count_definitions() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
	PERFORM public.sb_increment(tg_tag::name, 1, 'public.b_name');
EXCEPTION WHEN OTHERS THEN
	NULL;
END $$;
CREATE TABLE ruled (a text);

-- whom search paths may lead to

CREATE FUNCTION evil.sb_increment(text, bigint, regclass) RETURNS void LANGUAGE sql AS 'SELECT 1 / 0';

CREATE FUNCTION evil.int8pl(bigint, bigint) RETURNS bigint LANGUAGE sql AS 'SELECT 1 / 0 + $1';

CREATE FUNCTION evil.take(text[], bigint[]) RETURNS void LANGUAGE sql AS 'SELECT 1 / 0';
CREATE DOMAIN evil.text AS int;
CREATE DOMAIN evil.int8 AS int;
CREATE TABLE evil.b_text (key text, n bigint);
GRANT ALL ON ALL TABLES IN SCHEMA public TO PUBLIC;
GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO PUBLIC;
REVOKE ALL ON a_foreign FROM PUBLIC;

-- handlers that do what handlers should not

CREATE FUNCTION rude(buffer text, key text, count bigint) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	IF NOT (SELECT m.rude FROM public.mood m) THEN
		RETURN true;
	END IF;
	CASE floor(random() * 27)::int
		WHEN 0 THEN EXECUTE format('TRUNCATE %s', buffer);
		WHEN 1 THEN EXECUTE format('ALTER FOREIGN TABLE %s OPTIONS (SET interval %L)', buffer, '20ms');
		WHEN 2 THEN EXECUTE format('DROP FOREIGN TABLE %s', buffer);
		WHEN 3 THEN PERFORM public.sb_stop(buffer);
		WHEN 4 THEN PERFORM public.sb_start(buffer);
		WHEN 5 THEN PERFORM public.sb_flush_all(buffer);
		WHEN 6 THEN PERFORM public.sb_drain(buffer);
		WHEN 7 THEN PERFORM public.sb_drain('public.r_2', '20ms');
		WHEN 8 THEN PERFORM public.sb_increment(left(key, 100) || 'x', 1, buffer);
		WHEN 9 THEN EXECUTE format('INSERT INTO %s SELECT %L || g, 1 FROM generate_series(1, 20) g', buffer, left(key, 10));
		WHEN 10 THEN PERFORM count(*) FROM public.sb_keys(buffer);
		WHEN 11 THEN PERFORM pg_terminate_backend(pg_backend_pid());
		WHEN 12 THEN PERFORM pg_sleep(0.05);
		WHEN 13 THEN PERFORM set_config('role', 'fuzz_writer', random() < 0.5);
		WHEN 14 THEN PERFORM set_config('statement_timeout', '1', false);
		WHEN 15 THEN PERFORM set_config('search_path', '', false);
		WHEN 16 THEN
			BEGIN
				PERFORM public.sb_increment(key, 1, buffer);
				RAISE 'inner';
			EXCEPTION WHEN raise_exception THEN
				PERFORM public.sb_async_increment('caught', 1, 'public.r_1');
			END;
		WHEN 17 THEN PERFORM public.sb_async_increment(left(key, 100) || 'y', 1, buffer);
		WHEN 18 THEN EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', buffer);
		WHEN 19 THEN PERFORM public.sb_flush(key, buffer);
		WHEN 20 THEN PERFORM public.sb_count(key, buffer), public.sb_stat_reset(buffer);
		WHEN 21 THEN NOTIFY something;
		WHEN 22 THEN EXECUTE 'CREATE TEMP TABLE IF NOT EXISTS leftover AS SELECT 1';
		WHEN 23 THEN PERFORM set_config('session_authorization', 'fuzz_owner', false);
		WHEN 24 THEN EXECUTE 'EXPLAIN ANALYZE SELECT * FROM ' || buffer || ' x JOIN ' || buffer || ' y USING (n)';
		WHEN 25 THEN PERFORM public.nest('SELECT public.sb_increment(''nested'', 1, ''public.r_3'')', 70);
		ELSE RETURN public.in_the_mood();
	END CASE;
	RETURN true;
END $$;

CREATE FUNCTION rude_1(key text, count bigint) RETURNS boolean LANGUAGE sql AS $$
	SELECT public.rude('public.r_1', key, count)
$$;

CREATE FUNCTION rude_2(keys text[], counts bigint[]) RETURNS boolean LANGUAGE sql AS $$
	SELECT public.rude('public.r_2', keys[1], counts[1])
$$;

CREATE FUNCTION rude_3(key text, count bigint) RETURNS boolean LANGUAGE sql AS $$
	SELECT public.rude('public.r_3', key, count)
$$;

-- what needs the buffers

CREATE RULE r AS ON INSERT TO ruled DO ALSO INSERT INTO b_text VALUES (NEW.a);
CREATE VIEW v_text AS SELECT key, n FROM b_text WHERE key <> 'x' WITH CHECK OPTION;
CREATE VIEW v_instead AS SELECT key, n FROM b_text;
CREATE TRIGGER i INSTEAD OF INSERT ON v_instead FOR EACH ROW EXECUTE FUNCTION meddle();
CREATE MATERIALIZED VIEW a_matview AS SELECT * FROM b_text;
CREATE EVENT TRIGGER definitions ON ddl_command_end EXECUTE FUNCTION count_definitions();
