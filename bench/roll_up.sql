WITH taken AS (DELETE FROM appended RETURNING key, n)
INSERT INTO totals SELECT key, sum(n) FROM taken GROUP BY key
ON CONFLICT (key) DO UPDATE SET n = totals.n + EXCLUDED.n
\watch 1
