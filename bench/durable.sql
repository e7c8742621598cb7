-- Buffers that are durable and one that is not, and other ways to count so that
-- a crash loses nothing.

CREATE TABLE totals_of (buffer text, key text, n bigint NOT NULL, PRIMARY KEY (buffer, key));
CREATE FUNCTION store_durable(keys text[], counts bigint[]) RETURNS void LANGUAGE sql AS $$
	INSERT INTO totals_of SELECT 'durable', unnest(keys), unnest(counts)
	ON CONFLICT (buffer, key) DO UPDATE SET n = totals_of.n + EXCLUDED.n
$$;
CREATE FUNCTION store_soft(keys text[], counts bigint[]) RETURNS void LANGUAGE sql AS $$
	INSERT INTO totals_of SELECT 'soft', unnest(keys), unnest(counts)
	ON CONFLICT (buffer, key) DO UPDATE SET n = totals_of.n + EXCLUDED.n
$$;
CREATE FUNCTION store_keys(keys text[], counts bigint[]) RETURNS void LANGUAGE sql AS $$
	INSERT INTO totals_of SELECT 'keys', unnest(keys), unnest(counts)
	ON CONFLICT (buffer, key) DO UPDATE SET n = totals_of.n + EXCLUDED.n
$$;
CREATE FUNCTION store_branches(bids integer[], counts bigint[]) RETURNS void LANGUAGE sql AS $$
	INSERT INTO totals_of SELECT 'branches', unnest(bids), unnest(counts)
	ON CONFLICT (buffer, key) DO UPDATE SET n = totals_of.n + EXCLUDED.n
$$;
CREATE FOREIGN TABLE durable (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store_durable', interval '1s', durable 'true');
CREATE FOREIGN TABLE soft (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store_soft', interval '1s');
CREATE FOREIGN TABLE keys (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store_keys', interval '1s', durable 'true');
CREATE FOREIGN TABLE branches (bid integer NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store_branches', interval '1s', durable 'true');
CREATE FOREIGN TABLE recovered (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h', durable 'true');

-- flushed into a table that has the keys
CREATE TABLE source AS SELECT id, 'key ' || to_char(id, 'FM000000000000') AS key
	FROM generate_series(1, :keys) AS id;
CREATE FOREIGN TABLE flush_durable (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h', durable 'true');
CREATE FOREIGN TABLE flush_soft (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');

-- a row of the size of the ledger's, for each increment, and no index
CREATE TABLE inserted (epoch bigint, incarnation bigint, body bytea);
ALTER TABLE inserted ALTER COLUMN body SET STORAGE PLAIN;

-- a row that everybody updates
CREATE TABLE hot (key text PRIMARY KEY, n bigint NOT NULL);
INSERT INTO hot VALUES ('x', 0);

-- a row for each increment, which a job adds up every second
CREATE TABLE appended (key text NOT NULL, n bigint NOT NULL);
CREATE TABLE totals (key text PRIMARY KEY, n bigint NOT NULL);

VACUUM ANALYZE;
