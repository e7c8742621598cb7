-- How many rows each branch got from runs with counting triggers, by who
-- counts: as the triggers and as the tables tell.

CREATE TABLE branch_counts (who text, bid integer, n bigint NOT NULL, PRIMARY KEY (who, bid));
CREATE TABLE accounted (LIKE branch_counts INCLUDING ALL);
INSERT INTO branch_counts SELECT 'update', bid, 0 FROM pgbench_branches;
INSERT INTO accounted SELECT 'update', bid, 0 FROM pgbench_branches;

-- what a run has left, by itself or in the buffer
CREATE PROCEDURE account(who text) LANGUAGE sql AS $$
	INSERT INTO accounted
	SELECT CASE who WHEN 'update' THEN 'update' ELSE 'buffer' END, bid, count(*)
	FROM pgbench_history WHERE who <> 'none' GROUP BY bid
	ON CONFLICT ON CONSTRAINT accounted_pkey DO UPDATE SET n = accounted.n + EXCLUDED.n;
	TRUNCATE pgbench_history;
$$;

CREATE FUNCTION store_branches(bids integer[], counts bigint[]) RETURNS void LANGUAGE sql AS $$
	INSERT INTO branch_counts
	SELECT 'buffer', * FROM unnest(bids, counts)
	ON CONFLICT (who, bid) DO UPDATE SET n = branch_counts.n + EXCLUDED.n
$$;

CREATE FOREIGN TABLE branch_hits (bid integer NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store_branches', interval '1s');

CREATE FUNCTION count_by_plpgsql() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	PERFORM sb_increment(NEW.bid, buffer => 'branch_hits');
	RETURN NULL;
END
$$;

CREATE FUNCTION count_by_update() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	UPDATE branch_counts SET n = n + 1 WHERE who = 'update' AND bid = NEW.bid;
	RETURN NULL;
END
$$;

VACUUM ANALYZE;
