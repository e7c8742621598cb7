-- What every server of dev/bench has.  :probe is the library built from
-- bench/probe.c.

CREATE EXTENSION statbuffer;

-- Sessions with this schema on their search path call the function that does
-- nothing by the increment's name.
CREATE SCHEMA noop;
CREATE FUNCTION noop.sb_increment(key text, count bigint DEFAULT 1, buffer regclass DEFAULT '-')
RETURNS bigint
AS :probe, 'noop' LANGUAGE C VOLATILE PARALLEL RESTRICTED;

CREATE TABLE stored (key text PRIMARY KEY, n bigint NOT NULL);

CREATE FUNCTION store(keys text[], counts bigint[]) RETURNS void LANGUAGE sql AS $$
	INSERT INTO stored
	SELECT unnest(keys), unnest(counts)
	ON CONFLICT (key) DO UPDATE SET n = stored.n + EXCLUDED.n
$$;

CREATE FOREIGN TABLE hits (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store', interval '1s');
