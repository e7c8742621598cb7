--
-- setup: the extension is created, and says of everything what it is for.
-- What is made here serves all tests that follow.
--

CREATE EXTENSION statbuffer;

-- Every object of the extension has a comment: no row must be seen.  (Since
-- version 17 the row types of its views are among them.)
SELECT pg_describe_object(classid, objid, objsubid) AS without_comment
  FROM pg_depend
  WHERE refclassid = 'pg_extension'::regclass
    AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'statbuffer')
    AND deptype = 'e' AND classid <> 'pg_type'::regclass
    AND obj_description(objid, classid::regclass::name) IS NULL
  ORDER BY 1;

-- So has every column of its views, and the extension itself.
SELECT attrelid::regclass, attname AS without_comment
  FROM pg_attribute
    JOIN pg_depend ON classid = 'pg_class'::regclass AND objid = attrelid
  WHERE refclassid = 'pg_extension'::regclass
    AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'statbuffer')
    AND deptype = 'e' AND attnum > 0
    AND col_description(attrelid, attnum) IS NULL
  ORDER BY 1, attnum;

SELECT obj_description(oid, 'pg_extension') IS NOT NULL AS has_comment
  FROM pg_extension WHERE extname = 'statbuffer';

-- The functions that users call, as they are called.  None of them may run
-- in a parallel worker.
SELECT p.oid::regprocedure AS function,
       pg_get_function_arguments(p.oid) AS arguments,
       pg_get_function_result(p.oid) AS result,
       provolatile AS volatile, proparallel <> 's' AS not_parallel_safe
  FROM pg_proc p
    JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid
  WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
    AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'statbuffer')
    AND proname IN ('sb_increment', 'sb_async_increment', 'sb_count',
                    'sb_flush', 'sb_flush_all', 'sb_drain', 'sb_start',
                    'sb_stop', 'sb_keys', 'sb_stat_reset', 'sb_trigger',
                    'sb_create', 'sb_total', 'sb_totals')
  ORDER BY proname COLLATE "C", pg_get_function_arguments(p.oid) COLLATE "C";

-- The view for operators.
SELECT attname, format_type(atttypid, atttypmod)
  FROM pg_attribute
  WHERE attrelid = 'sb_stat_buffers'::regclass AND attnum > 0
  ORDER BY attnum;

-- There is no buffer yet.
SELECT * FROM sb_stat_buffers;

-- The settings have a description, a unit where one is needed, and a range.
SELECT name, setting, unit, min_val, short_desc <> '' AS described
  FROM pg_settings
  WHERE name LIKE 'statbuffer.%'
  ORDER BY name;
SHOW statbuffer.max_memory;
SHOW statbuffer.max_shutdown;
SHOW statbuffer.max_workers;

-- The prefix is reserved.
SET statbuffer.no_such_setting = 1;

-- For the tests that follow: wait until a condition holds.  False when it
-- does not within a minute, which is a lot longer than it ever takes.
CREATE FUNCTION wait_until(condition text) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
  give_up timestamptz := clock_timestamp() + interval '110 s';
  holds boolean;
BEGIN
  LOOP
    EXECUTE 'SELECT ' || condition INTO holds;
    IF holds THEN
      RETURN true;
    ELSIF clock_timestamp() > give_up THEN
      RETURN false;
    END IF;
    PERFORM pg_sleep(0.01);
    -- pg_stat_activity stays as it was first seen in the transaction
    PERFORM pg_stat_clear_snapshot();
  END LOOP;
END $$;
SELECT wait_until('true');
