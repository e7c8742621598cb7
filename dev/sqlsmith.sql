-- What sqlsmith is to see of the fuzz test's world.
--
-- It reads the catalogs, and then joins any relation with any other, calls any
-- function as often as any other, and takes the columns at hand as arguments, or
-- null.  So it sees little else than buffers, and values of the types of their
-- keys are always at hand: from relations that have a column of each type, as
-- defaults, and from functions without arguments, which it likes best.

-- what no buffer can be, and what takes minutes to read
DROP FOREIGN TABLE s_none, s_one, s_int, s_domain, s_generated, s_wide;

CREATE TABLE total_text (key text PRIMARY KEY, n bigint NOT NULL DEFAULT 0);
CREATE TABLE total_pair (a int, b text, n bigint NOT NULL DEFAULT 0, PRIMARY KEY (a, b));
SELECT sb_create('t_text', 'total_text', 'n'), sb_create('t_pair', 'total_pair', 'n', 'interval=1d');
GRANT SELECT ON total_text, total_pair TO PUBLIC;

CREATE SCHEMA calls;
GRANT USAGE ON SCHEMA calls TO PUBLIC;
SET check_function_bodies = on;

-- values
DO $$
DECLARE
	sample record;
BEGIN
	FOR sample IN
		SELECT attname, format_type(atttypid, atttypmod) AS type FROM pg_attribute
		WHERE attrelid = 'samples'::regclass AND attnum > 0 AND attname <> 'id'
	LOOP
		EXECUTE format('UPDATE samples SET %1$I = (SELECT %1$I FROM samples WHERE id = 1) WHERE %1$I IS NULL', sample.attname);
		EXECUTE format('CREATE FUNCTION calls.%I() RETURNS %s LANGUAGE sql AS %L', sample.attname, sample.type,
			format('SELECT %I FROM public.samples ORDER BY random() LIMIT 1', sample.attname));
	END LOOP;
END $$;
GRANT SELECT ON samples TO PUBLIC;

-- the buffers, with functions and views for each
DO $$
DECLARE
	buffer record;
	call record;
	form text;
	function text;
BEGIN
	FOR buffer IN
		SELECT relname AS name, relname ~ '^[krs]_' AS owned, relname ~ '^t_' AS has_target,
			string_agg(format_type(atttypid, atttypmod), ', ' ORDER BY attnum) AS types,
			string_agg('$' || number, ', ' ORDER BY attnum) AS arguments,
			string_agg(format('calls.%I()', sample), ', ' ORDER BY attnum) AS samples,
			string_agg(format('%I', sample), ', ' ORDER BY attnum) AS columns,
			string_agg(format('ALTER %I SET DEFAULT calls.%I()', attname, sample), ', ' ORDER BY attnum) AS defaults,
			count(*) > 1 OR bool_or(typcategory IN ('A', 'C') OR typname = 'char') AS is_row
		FROM pg_class c,
			LATERAL (SELECT *, row_number() OVER (ORDER BY attnum) AS number FROM pg_attribute
				WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped) AS a,
			LATERAL (SELECT attname FROM pg_attribute
				WHERE attrelid = 'samples'::regclass AND attnum > 0 AND attname <> 'id' AND atttypid = a.atttypid
				ORDER BY atttypmod = a.atttypmod DESC LIMIT 1) AS s (sample),
			LATERAL (SELECT typcategory, typname FROM pg_type WHERE oid = a.atttypid) AS t
		WHERE relkind = 'f' AND relnamespace = 'public'::regnamespace AND relname ~ '^[bkrst]_' AND attname <> 'n'
		GROUP BY relname
	LOOP
		form := CASE WHEN buffer.is_row THEN 'ROW(%s)' ELSE '%s' END;
		FOR call IN
			SELECT * FROM (VALUES
				-- what returns void, sqlsmith has no use for
				('increment', '(sb_increment(%1$s, buffer => %2$L) IS NULL)::int::bigint', true),
				('async_increment', '(sb_async_increment(%1$s, 2, %2$L) IS NULL)::int::bigint', true),
				('count', 'sb_count(%1$s, %2$L)', true),
				('flush', '(sb_flush(%1$s, %2$L) IS NULL)::int::bigint', buffer.owned),
				('total', 'sb_total(%1$s, %2$L)', buffer.has_target)) AS c (name, form, fits)
			WHERE fits
		LOOP
			function := format('calls.%I', call.name || '_' || buffer.name);
			EXECUTE format('CREATE FUNCTION %s(%s) RETURNS bigint LANGUAGE sql AS %L', function, buffer.types,
				'SELECT ' || format(call.form, format(form, buffer.arguments), buffer.name));
			EXECUTE format('CREATE FUNCTION %s() RETURNS bigint LANGUAGE sql AS %L', function,
				'SELECT ' || format(call.form, format(form, buffer.samples), buffer.name));
			IF call.name = 'flush' THEN
				EXECUTE format('REVOKE ALL ON ROUTINE %1$s(%2$s), %1$s() FROM PUBLIC', function, buffer.types);
				EXECUTE format('GRANT ALL ON ROUTINE %1$s(%2$s), %1$s() TO fuzz_owner', function, buffer.types);
			END IF;
		END LOOP;
		-- in PL/pgSQL, as the planner locks what a function in SQL inserts into
		function := format('calls.%I', 'insert_' || buffer.name);
		EXECUTE format('CREATE FUNCTION %s(%s) RETURNS bigint LANGUAGE plpgsql AS %L', function, buffer.types,
			format('BEGIN INSERT INTO %I VALUES (%s); RETURN 1; END', buffer.name, buffer.arguments));
		EXECUTE format('CREATE FUNCTION %s() RETURNS bigint LANGUAGE plpgsql AS %L', function,
			format('BEGIN INSERT INTO %I VALUES (%s); RETURN 1; END', buffer.name, buffer.samples));

		-- what is selected from an empty buffer is not called
		IF buffer.name ~ '^k_' THEN
			EXECUTE format('ALTER FOREIGN TABLE %I OPTIONS (SET interval %L)', buffer.name, '1d');
			PERFORM try(format('INSERT INTO %I SELECT %s FROM samples', buffer.name, buffer.columns), 0);
		END IF;
		EXECUTE format('ALTER FOREIGN TABLE %I %s', buffer.name, buffer.defaults);
		EXECUTE format('GRANT SELECT, INSERT ON %I TO fuzz_owner, fuzz_writer', buffer.name);
		EXECUTE format('CREATE VIEW calls.%I AS SELECT s.*, b.* FROM samples s LEFT JOIN (SELECT * FROM %I LIMIT 2) AS b ON true',
			'with_' || buffer.name, buffer.name);
		IF buffer.owned THEN
			EXECUTE format('ALTER FOREIGN TABLE %I OWNER TO fuzz_owner', buffer.name);
		END IF;
	END LOOP;
END $$;
CREATE VIEW calls.keys AS SELECT * FROM sb_keys('k_text');
CREATE VIEW calls.totals AS SELECT * FROM sb_totals('t_text');
GRANT SELECT ON ALL TABLES IN SCHEMA calls TO PUBLIC;

-- what each query that succeeded has done with buffers, by the locks that it
-- holds: see sqlsmith.c
CREATE SCHEMA smith;
GRANT USAGE ON SCHEMA smith TO PUBLIC;
CREATE UNLOGGED TABLE smith.queries (username name, counted boolean, has_read boolean);
CREATE FUNCTION smith.note_query() RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
	INSERT INTO smith.queries
	SELECT session_user, coalesce(bool_or(mode = 'RowExclusiveLock'), false), coalesce(bool_or(mode = 'AccessShareLock'), false)
	FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'relation' AND relation IN (SELECT ftrelid FROM pg_foreign_table)
$$;

-- Its catalogs.  It inserts only into what it takes for an ordinary table, and
-- samples only these, too, of which it desists as that never succeeds.
ALTER VIEW information_schema.tables RENAME TO all_tables;
CREATE VIEW information_schema.tables AS
	SELECT table_name, table_schema, is_insertable_into,
		CASE table_type WHEN 'FOREIGN' THEN 'BASE TABLE' ELSE 'VIEW' END AS table_type
	FROM information_schema.all_tables
	WHERE table_schema = 'calls' OR table_schema = 'public'
		AND (table_type = 'FOREIGN' AND table_name ~ '^[bkrst]_' OR table_name IN ('samples', 'sb_stat_buffers', 'v_text'));
GRANT SELECT ON information_schema.tables TO PUBLIC;
CREATE VIEW smith.pg_proc AS
	SELECT * FROM pg_catalog.pg_proc
	WHERE has_function_privilege(oid, 'EXECUTE')
		AND (pronamespace = 'calls'::regnamespace OR proname ~ '^sb_(count|total)$'
			OR proname IN ('counting', 'counted_agg', 'control_async', 'expanded', 'expanded_row')
			OR pronamespace = 'pg_catalog'::regnamespace
				AND (prokind = 'a' OR proname IN ('abs', 'int8', 'length', 'lower', 'md5', 'reverse', 'upper')));
GRANT SELECT ON smith.pg_proc TO PUBLIC;
ALTER ROLE fuzz_owner SET search_path = smith, pg_catalog, public;
ALTER ROLE fuzz_writer SET search_path = smith, pg_catalog, public;
