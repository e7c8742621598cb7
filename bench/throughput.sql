-- The other ways to count, each with its own tables.

-- a row that everybody updates; which schema a session finds it in decides
-- what kind of table it is
CREATE SCHEMA update;
CREATE TABLE update.hot (key text PRIMARY KEY, n bigint NOT NULL);
CREATE SCHEMA update_async;
CREATE TABLE update_async.hot (LIKE update.hot INCLUDING ALL);
CREATE SCHEMA update_unlogged;
CREATE UNLOGGED TABLE update_unlogged.hot (LIKE update.hot INCLUDING ALL);
INSERT INTO update.hot VALUES ('x', 0);
INSERT INTO update_async.hot VALUES ('x', 0);
INSERT INTO update_unlogged.hot VALUES ('x', 0);

-- many at a time, as a transaction that does more than one thing would
CREATE FUNCTION increment_hundred() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
	FOR i IN 1 .. 100 LOOP
		PERFORM sb_increment('x', 1, 'hits');
	END LOOP;
END
$$;
CREATE FUNCTION update_hundred() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
	FOR i IN 1 .. 100 LOOP
		UPDATE hot SET n = n + 1 WHERE key = 'x';
	END LOOP;
END
$$;

-- 64 rows instead of one, which a reader adds up
CREATE TABLE slotted (key text, slot integer, n bigint NOT NULL, PRIMARY KEY (key, slot));
INSERT INTO slotted SELECT 'x', slot, 0 FROM generate_series(0, 63) AS slot;

-- a row for each increment, which a job adds up every second
CREATE TABLE appended (key text NOT NULL, n bigint NOT NULL);
CREATE TABLE totals (key text PRIMARY KEY, n bigint NOT NULL);

-- fast, but of one key that cannot roll back
CREATE SEQUENCE numbers;

VACUUM ANALYZE;
