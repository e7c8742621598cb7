-- :keys keys in no order, as they would come from traffic.

CREATE TABLE source (id integer PRIMARY KEY, key text NOT NULL);
INSERT INTO source
SELECT row_number() OVER (ORDER BY md5(n::text)), 'key ' || n FROM generate_series(1, :keys) AS n;

-- The worker stays while nothing is due, so that its start is not measured;
-- and nothing is due before it is asked for.
CREATE FUNCTION store_one(of_key text, count bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO stored VALUES (of_key, count)
	ON CONFLICT (key) DO UPDATE SET n = stored.n + EXCLUDED.n;
END
$$;

CREATE FOREIGN TABLE target_hits (key text NOT NULL, n bigint NOT NULL)
	SERVER statbuffer OPTIONS (target 'stored', interval '1h', timeout '1h');
CREATE FOREIGN TABLE target_in_one_hits (key text NOT NULL, n bigint NOT NULL)
	SERVER statbuffer OPTIONS (target 'stored', interval '1h', timeout '1h', batch_size '100000');
CREATE FOREIGN TABLE array_hits (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
CREATE FOREIGN TABLE array_in_one_hits (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h', batch_size '100000');
CREATE FOREIGN TABLE one_hits (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store_one', interval '1h', timeout '1h');

-- The statement of the array handler, from a table.
CREATE PROCEDURE upsert_by_hand(keys integer, batch_size integer) LANGUAGE plpgsql AS $$
BEGIN
	FOR from_id IN 1 .. keys BY batch_size LOOP
		INSERT INTO stored
		SELECT key, 1 FROM source WHERE id BETWEEN from_id AND from_id + batch_size - 1 ORDER BY key
		ON CONFLICT (key) DO UPDATE SET n = stored.n + EXCLUDED.n;
		COMMIT;
	END LOOP;
END
$$;

-- A statement for each key.
CREATE PROCEDURE loop_by_hand(keys integer, batch_size integer) LANGUAGE plpgsql AS $$
DECLARE
	taken record;
BEGIN
	FOR from_id IN 1 .. keys BY batch_size LOOP
		FOR taken IN
			SELECT key, 1 AS n FROM source WHERE id BETWEEN from_id AND from_id + batch_size - 1 ORDER BY key
		LOOP
			INSERT INTO stored VALUES (taken.key, taken.n)
			ON CONFLICT (key) DO UPDATE SET n = stored.n + EXCLUDED.n;
		END LOOP;
		COMMIT;
	END LOOP;
END
$$;

-- The same, by calling the handler.
CREATE PROCEDURE call_by_hand(keys integer, batch_size integer) LANGUAGE plpgsql AS $$
DECLARE
	taken record;
BEGIN
	FOR from_id IN 1 .. keys BY batch_size LOOP
		FOR taken IN
			SELECT key, 1 AS n FROM source WHERE id BETWEEN from_id AND from_id + batch_size - 1 ORDER BY key
		LOOP
			PERFORM store_one(taken.key, taken.n);
		END LOOP;
		COMMIT;
	END LOOP;
END
$$;

VACUUM ANALYZE;
