/* statbuffer--1.0.sql */

-- complain if the script is sourced in psql rather than CREATE EXTENSION
\echo Use "CREATE EXTENSION statbuffer" to load this file. \quit

--
-- The foreign table
--

CREATE FUNCTION statbuffer_fdw_handler() RETURNS fdw_handler
AS 'MODULE_PATHNAME' LANGUAGE C STRICT;
COMMENT ON FUNCTION statbuffer_fdw_handler() IS
'foreign-data wrapper handler of statbuffer';

CREATE FUNCTION statbuffer_fdw_validator(options text[], catalog oid) RETURNS void
AS 'MODULE_PATHNAME' LANGUAGE C STRICT;
COMMENT ON FUNCTION statbuffer_fdw_validator(text[], oid) IS
'checks the options of buffers';

CREATE FOREIGN DATA WRAPPER statbuffer
	HANDLER statbuffer_fdw_handler
	VALIDATOR statbuffer_fdw_validator;
COMMENT ON FOREIGN DATA WRAPPER statbuffer IS
'adds up increments of hot counters in memory';

CREATE SERVER statbuffer FOREIGN DATA WRAPPER statbuffer;
COMMENT ON SERVER statbuffer IS
'server of the foreign tables that are buffers of counts';

--
-- The ledger of durable buffers
--
-- Materialized views that are never populated: storage that nobody can write to
-- or read by SQL, and that is in no publication.  See doc/internals.md.
--

CREATE TYPE sb_ledger_body;
CREATE FUNCTION sb_ledger_body_in(cstring) RETURNS sb_ledger_body
AS 'byteain' LANGUAGE internal IMMUTABLE STRICT PARALLEL SAFE;
COMMENT ON FUNCTION sb_ledger_body_in(cstring) IS
'input function of sb_ledger_body';
CREATE FUNCTION sb_ledger_body_out(sb_ledger_body) RETURNS cstring
AS 'byteaout' LANGUAGE internal IMMUTABLE STRICT PARALLEL SAFE;
COMMENT ON FUNCTION sb_ledger_body_out(sb_ledger_body) IS
'output function of sb_ledger_body';

-- Not bytea, for that is toasted, and ANALYZE would show keys in pg_stats.
CREATE TYPE sb_ledger_body (
	INPUT = sb_ledger_body_in,
	OUTPUT = sb_ledger_body_out,
	INTERNALLENGTH = VARIABLE,
	ALIGNMENT = int4,
	STORAGE = plain
);
COMMENT ON TYPE sb_ledger_body IS
'keys, and what was added to each, in the ledger of durable buffers';

CREATE FUNCTION sb_ledger_rows(OUT epoch bigint, OUT incarnation bigint, OUT body sb_ledger_body, OUT shape bytea)
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION sb_ledger_rows() IS
'raises an error: keeps the ledger of durable buffers from being refreshed';
REVOKE ALL ON FUNCTION sb_ledger_rows() FROM PUBLIC;

-- vacuum_truncate: nobody who commits is to wait for it.
CREATE MATERIALIZED VIEW sb_ledger_0 USING heap WITH (vacuum_truncate = off) AS
	SELECT epoch, incarnation, body FROM @extschema@.sb_ledger_rows() WITH NO DATA;
COMMENT ON MATERIALIZED VIEW sb_ledger_0 IS
'ledger of durable buffers: what was counted and is not stored';
CREATE MATERIALIZED VIEW sb_ledger_1 USING heap WITH (vacuum_truncate = off) AS
	SELECT epoch, incarnation, body FROM @extschema@.sb_ledger_rows() WITH NO DATA;
COMMENT ON MATERIALIZED VIEW sb_ledger_1 IS
'the other ledger of durable buffers: while one is emptied, counts go to the other';
CREATE MATERIALIZED VIEW sb_ledger_prepared USING heap WITH (vacuum_truncate = off) AS
	SELECT epoch, incarnation, body FROM @extschema@.sb_ledger_rows() WITH NO DATA;
COMMENT ON MATERIALIZED VIEW sb_ledger_prepared IS
'what prepared transactions have counted in durable buffers';
CREATE MATERIALIZED VIEW sb_ledger_epochs USING heap WITH (vacuum_truncate = off) AS
	SELECT epoch, NULL::pg_catalog.oid AS buffer, shape
	FROM @extschema@.sb_ledger_rows() WITH NO DATA;
COMMENT ON MATERIALIZED VIEW sb_ledger_epochs IS
'which buffer a row of the ledger is of, and what its keys consist of';

COMMENT ON COLUMN sb_ledger_0.epoch IS 'the epoch in sb_ledger_epochs that the row is of';
COMMENT ON COLUMN sb_ledger_0.incarnation IS 'the life of the shared memory that has the counts of the row, too';
COMMENT ON COLUMN sb_ledger_0.body IS 'keys, and what was added to each';
COMMENT ON COLUMN sb_ledger_1.epoch IS 'the epoch in sb_ledger_epochs that the row is of';
COMMENT ON COLUMN sb_ledger_1.incarnation IS 'the life of the shared memory that has the counts of the row, too';
COMMENT ON COLUMN sb_ledger_1.body IS 'keys, and what was added to each';
COMMENT ON COLUMN sb_ledger_prepared.epoch IS 'the epoch in sb_ledger_epochs that the row is of';
COMMENT ON COLUMN sb_ledger_prepared.incarnation IS '0: in no memory yet';
COMMENT ON COLUMN sb_ledger_prepared.body IS 'keys, and what was added to each';
COMMENT ON COLUMN sb_ledger_epochs.epoch IS 'random number of a span of the buffer''s life';
COMMENT ON COLUMN sb_ledger_epochs.buffer IS 'OID of the buffer';
COMMENT ON COLUMN sb_ledger_epochs.shape IS 'the types of its key columns at that time';

--
-- Creating
--

CREATE FUNCTION sb_create(buffer text, target regclass, "column" name, VARIADIC options text[] DEFAULT '{}')
RETURNS regclass
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION sb_create(text, regclass, name, text[]) IS
'creates a buffer whose counts go to a column of a table';

CREATE FUNCTION sb_create_view(view text, buffer regclass)
RETURNS regclass
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION sb_create_view(text, regclass) IS
'creates an updatable view of a buffer''s target that has the totals in place of the count column';

CREATE FUNCTION sb_view_trigger() RETURNS trigger
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION sb_view_trigger() IS
'trigger function of the views that sb_create_view() creates';

--
-- Counting
--
-- Functions of a key are there for text, which literals are taken as, and for
-- all other types.  "char" would match both, so it has its own.
--

CREATE FUNCTION sb_increment(key text, count bigint DEFAULT 1, buffer regclass DEFAULT '-')
RETURNS bigint
AS 'MODULE_PATHNAME', 'sb_increment_text' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
COMMENT ON FUNCTION sb_increment(text, bigint, regclass) IS
'adds to a key''s count as part of the transaction; returns what the transaction has added';

CREATE FUNCTION sb_increment(key anyelement, count bigint DEFAULT 1, buffer regclass DEFAULT '-')
RETURNS bigint
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
COMMENT ON FUNCTION sb_increment(anyelement, bigint, regclass) IS
'adds to a key''s count as part of the transaction; returns what the transaction has added; several key columns are specified as a row';

CREATE FUNCTION sb_increment(key "char", count bigint DEFAULT 1, buffer regclass DEFAULT '-')
RETURNS bigint
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
COMMENT ON FUNCTION sb_increment("char", bigint, regclass) IS
'adds to a key''s count as part of the transaction; returns what the transaction has added';

CREATE FUNCTION sb_async_increment(key text, count bigint DEFAULT 1, buffer regclass DEFAULT '-')
RETURNS bigint
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION sb_async_increment(text, bigint, regclass) IS
'adds to a key''s count at once, regardless of the outcome of the transaction; returns what it has added';

CREATE FUNCTION sb_async_increment(key anyelement, count bigint DEFAULT 1, buffer regclass DEFAULT '-')
RETURNS bigint
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION sb_async_increment(anyelement, bigint, regclass) IS
'adds to a key''s count at once, regardless of the outcome of the transaction; returns what it has added; several key columns are specified as a row';

CREATE FUNCTION sb_async_increment(key "char", count bigint DEFAULT 1, buffer regclass DEFAULT '-')
RETURNS bigint
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION sb_async_increment("char", bigint, regclass) IS
'adds to a key''s count at once, regardless of the outcome of the transaction; returns what it has added';

CREATE FUNCTION sb_trigger() RETURNS trigger
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
COMMENT ON FUNCTION sb_trigger() IS
'trigger function that counts the rows of a table; arguments: a buffer, and the columns that are its key';

--
-- Reading
--

CREATE FUNCTION sb_count(key text, buffer regclass DEFAULT '-')
RETURNS bigint
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
COMMENT ON FUNCTION sb_count(text, regclass) IS
'what is counted for a key and not yet stored; null when the buffer does not hold the key';

CREATE FUNCTION sb_count(key anyelement, buffer regclass DEFAULT '-')
RETURNS bigint
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
COMMENT ON FUNCTION sb_count(anyelement, regclass) IS
'what is counted for a key and not yet stored; null when the buffer does not hold the key';

CREATE FUNCTION sb_count(key "char", buffer regclass DEFAULT '-')
RETURNS bigint
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
COMMENT ON FUNCTION sb_count("char", regclass) IS
'what is counted for a key and not yet stored; null when the buffer does not hold the key';

CREATE FUNCTION sb_total(key text, buffer regclass DEFAULT '-')
RETURNS bigint
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION sb_total(text, regclass) IS
'what is stored for a key in the target of a buffer, plus what is counted; exact at every moment';

CREATE FUNCTION sb_total(key anyelement, buffer regclass DEFAULT '-')
RETURNS bigint
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION sb_total(anyelement, regclass) IS
'what is stored for a key in the target of a buffer, plus what is counted; exact at every moment';

CREATE FUNCTION sb_total(key "char", buffer regclass DEFAULT '-')
RETURNS bigint
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION sb_total("char", regclass) IS
'what is stored for a key in the target of a buffer, plus what is counted; exact at every moment';

CREATE FUNCTION sb_keys(buffer regclass DEFAULT '-',
	OUT key text,
	OUT count bigint,
	OUT in_flight bigint,
	OUT due_at timestamptz,
	OUT failures integer,
	OUT last_error text)
RETURNS SETOF record
AS 'MODULE_PATHNAME', 'sb_get_keys' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
COMMENT ON FUNCTION sb_keys(regclass) IS
'the keys that a buffer holds, with what is counted, what is being stored, when they are due and how they fail';

CREATE FUNCTION sb_totals(buffer regclass DEFAULT '-',
	OUT key text,
	OUT total bigint)
RETURNS SETOF record
AS 'MODULE_PATHNAME', 'sb_get_totals' LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION sb_totals(regclass) IS
'what is stored plus what is counted, for each key that a buffer with a target holds';

--
-- Flushing
--

CREATE FUNCTION sb_flush(key text, buffer regclass DEFAULT '-')
RETURNS boolean
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
COMMENT ON FUNCTION sb_flush(text, regclass) IS
'asks for a key''s flush now, without waiting for it; false when there is nothing to flush';

CREATE FUNCTION sb_flush(key anyelement, buffer regclass DEFAULT '-')
RETURNS boolean
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
COMMENT ON FUNCTION sb_flush(anyelement, regclass) IS
'asks for a key''s flush now, without waiting for it; false when there is nothing to flush';

CREATE FUNCTION sb_flush(key "char", buffer regclass DEFAULT '-')
RETURNS boolean
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
COMMENT ON FUNCTION sb_flush("char", regclass) IS
'asks for a key''s flush now, without waiting for it; false when there is nothing to flush';

CREATE FUNCTION sb_flush_all(buffer regclass DEFAULT '-')
RETURNS bigint
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
COMMENT ON FUNCTION sb_flush_all(regclass) IS
'asks for the flush of all keys of a buffer now, without waiting for it; returns their number';

CREATE FUNCTION sb_drain(buffer regclass DEFAULT '-', timeout interval DEFAULT NULL)
RETURNS boolean
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
COMMENT ON FUNCTION sb_drain(regclass, interval) IS
'flushes what was counted before the call and waits until it is stored; false on timeout';

--
-- Starting and stopping
--

CREATE FUNCTION sb_start(buffer regclass DEFAULT '-')
RETURNS boolean
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION sb_start(regclass) IS
'checks a buffer and starts it; creates the default buffer if needed';

CREATE FUNCTION sb_stop(buffer regclass DEFAULT '-')
RETURNS boolean
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION sb_stop(regclass) IS
'flushes all that was counted in a buffer and stops it; false when something is left; increments are errors until it is started';

--
-- Statistics
--

CREATE FUNCTION sb_stat_reset(buffer regclass DEFAULT '-')
RETURNS boolean
AS 'MODULE_PATHNAME', 'sb_reset_stats' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
COMMENT ON FUNCTION sb_stat_reset(regclass) IS
'sets a buffer''s statistics to zero';

CREATE FUNCTION sb_stat_get_buffer(buffer oid,
	OUT state text,
	OUT pid integer,
	OUT keys bigint,
	OUT pending bigint,
	OUT in_flight bigint,
	OUT memory bigint,
	OUT oldest_due timestamptz,
	OUT durable text,
	OUT increments bigint,
	OUT flushed_keys bigint,
	OUT flushed_count bigint,
	OUT handler_calls bigint,
	OUT failures bigint,
	OUT discarded bigint,
	OUT last_flush timestamptz,
	OUT last_error text,
	OUT last_error_at timestamptz,
	OUT stats_reset timestamptz)
AS 'MODULE_PATHNAME' LANGUAGE C STRICT VOLATILE PARALLEL RESTRICTED;
COMMENT ON FUNCTION sb_stat_get_buffer(oid) IS
'statistics of a buffer; use the view sb_stat_buffers';

CREATE FUNCTION sb_stat_get_memory(
	OUT buffers bigint,
	OUT keys bigint,
	OUT memory bigint,
	OUT mapped bigint,
	OUT max_memory bigint)
AS 'MODULE_PATHNAME' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
COMMENT ON FUNCTION sb_stat_get_memory() IS
'memory of all buffers; use the view sb_stat_memory';

CREATE VIEW sb_stat_memory AS
	SELECT
		m.buffers,
		m.keys,
		m.memory,
		m.mapped,
		m.max_memory
	FROM @extschema@.sb_stat_get_memory() m;
COMMENT ON VIEW sb_stat_memory IS
'the memory of all buffers of all databases, also of those that are not committed yet: one row';
COMMENT ON COLUMN sb_stat_memory.buffers IS 'number of buffers that have counted something, in all databases';
COMMENT ON COLUMN sb_stat_memory.keys IS 'number of keys that they hold';
COMMENT ON COLUMN sb_stat_memory.memory IS 'bytes of shared memory that they take with their keys';
COMMENT ON COLUMN sb_stat_memory.mapped IS 'bytes of shared memory that the server has taken from the system for them; null before PostgreSQL 17';
COMMENT ON COLUMN sb_stat_memory.max_memory IS 'statbuffer.max_memory in bytes';

GRANT SELECT ON sb_stat_memory TO PUBLIC;

CREATE VIEW sb_stat_buffers AS
	SELECT
		c.oid AS relid,
		n.nspname AS schemaname,
		c.relname AS buffer,
		pg_catalog.pg_get_userbyid(c.relowner) AS owner,
		s.state,
		s.pid,
		s.keys,
		s.pending,
		s.in_flight,
		s.memory,
		s.oldest_due,
		s.durable,
		CASE WHEN s.durable OPERATOR(pg_catalog.<>) 'off' THEN
			pg_catalog.pg_relation_size('@extschema@.sb_ledger_0'::pg_catalog.regclass)
			OPERATOR(pg_catalog.+)
			pg_catalog.pg_relation_size('@extschema@.sb_ledger_1'::pg_catalog.regclass)
		END AS ledger_size,
		s.increments,
		s.flushed_keys,
		s.flushed_count,
		s.handler_calls,
		s.failures,
		s.discarded,
		s.last_flush,
		s.last_error,
		s.last_error_at,
		s.stats_reset
	FROM pg_catalog.pg_class c
		JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace
		JOIN pg_catalog.pg_foreign_table ft ON ft.ftrelid OPERATOR(pg_catalog.=) c.oid
		JOIN pg_catalog.pg_foreign_server fs ON fs.oid OPERATOR(pg_catalog.=) ft.ftserver
		JOIN pg_catalog.pg_foreign_data_wrapper fdw ON fdw.oid OPERATOR(pg_catalog.=) fs.srvfdw
		CROSS JOIN LATERAL @extschema@.sb_stat_get_buffer(c.oid) s
	WHERE fdw.fdwhandler OPERATOR(pg_catalog.=)
		'@extschema@.statbuffer_fdw_handler()'::pg_catalog.regprocedure::pg_catalog.oid;
COMMENT ON VIEW sb_stat_buffers IS
'the buffers of this database: what they hold, and what was done since their statistics were reset';

COMMENT ON COLUMN sb_stat_buffers.relid IS 'OID of the buffer; functions take it, too';
COMMENT ON COLUMN sb_stat_buffers.schemaname IS 'name of the schema that it is in';
COMMENT ON COLUMN sb_stat_buffers.buffer IS 'name of the buffer';
COMMENT ON COLUMN sb_stat_buffers.owner IS 'the role that owns it; its worker runs as this role';
COMMENT ON COLUMN sb_stat_buffers.state IS 'running, idle (no worker is needed), stopped or failing';
COMMENT ON COLUMN sb_stat_buffers.pid IS 'process ID of its worker, or null';
COMMENT ON COLUMN sb_stat_buffers.keys IS 'number of keys that it holds';
COMMENT ON COLUMN sb_stat_buffers.pending IS 'sum of the counts that wait for a flush';
COMMENT ON COLUMN sb_stat_buffers.in_flight IS 'sum of the counts that are being stored';
COMMENT ON COLUMN sb_stat_buffers.memory IS 'bytes of shared memory that it takes with its keys';
COMMENT ON COLUMN sb_stat_buffers.oldest_due IS 'when the first of its keys is due';
COMMENT ON COLUMN sb_stat_buffers.durable IS 'off; on; or pending, while what the ledger has is not in memory after a restart';
COMMENT ON COLUMN sb_stat_buffers.ledger_size IS 'bytes of the ledger of all durable buffers of the database; null if this one is not durable';
COMMENT ON COLUMN sb_stat_buffers.increments IS 'number of increments published';
COMMENT ON COLUMN sb_stat_buffers.flushed_keys IS 'number of keys stored, counted at each flush';
COMMENT ON COLUMN sb_stat_buffers.flushed_count IS 'sum of the counts stored';
COMMENT ON COLUMN sb_stat_buffers.handler_calls IS 'number of calls of the handler';
COMMENT ON COLUMN sb_stat_buffers.failures IS 'number of failed attempts to store a key, or to call the handler at all';
COMMENT ON COLUMN sb_stat_buffers.discarded IS 'sum of the counts discarded because of the options restart ''temporary'' and when_full ''discard''';
COMMENT ON COLUMN sb_stat_buffers.last_flush IS 'when something was stored last';
COMMENT ON COLUMN sb_stat_buffers.last_error IS 'why an attempt failed last; for the owner and members of pg_read_all_stats';
COMMENT ON COLUMN sb_stat_buffers.last_error_at IS 'when it failed';
COMMENT ON COLUMN sb_stat_buffers.stats_reset IS 'when the statistics were last reset or started';

GRANT SELECT ON sb_stat_buffers TO PUBLIC;
