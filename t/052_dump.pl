# Buffers in dumps and copies: pg_dump and pg_restore, whole and in parts, into
# databases and servers of other names; pg_dumpall; pg_basebackup.  Definitions,
# options, owners, grants and comments come along; counts do not, as they are
# not yet data of the database.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $node = PostgreSQL::Test::Cluster->new('main');
$node->init(allows_streaming => 1);
$node->append_conf('postgresql.conf', q{
max_worker_processes = 16
log_line_prefix = '%m [%p] %b %q%a '
});
$node->start;
my $dir = PostgreSQL::Test::Utils::tempdir;

# --- what there is ----------------------------------------------------------

$node->safe_psql('postgres', q{
	CREATE ROLE keeper LOGIN;
	CREATE ROLE app;
	CREATE ROLE reader;
	CREATE DATABASE shop;
});
$node->safe_psql('shop', q{
	CREATE SCHEMA ext;
	CREATE EXTENSION statbuffer SCHEMA ext;
	GRANT USAGE, CREATE ON SCHEMA ext TO keeper;
	GRANT USAGE ON FOREIGN SERVER statbuffer TO keeper;
	GRANT CREATE ON DATABASE shop TO keeper;
	REVOKE SELECT ON ext.sb_stat_buffers FROM PUBLIC;
	GRANT SELECT ON ext.sb_stat_buffers TO reader;
	REVOKE EXECUTE ON FUNCTION ext.sb_keys FROM PUBLIC;
});
$node->safe_psql('shop', q{
	SET ROLE keeper;
	CREATE SCHEMA app;
	CREATE TABLE app.stored (key text PRIMARY KEY, total bigint);
	CREATE FUNCTION app.store(key text, counter bigint) RETURNS void LANGUAGE sql AS $$
		INSERT INTO app.stored AS s VALUES (key, counter)
		ON CONFLICT (key) DO UPDATE SET total = s.total + EXCLUDED.total
	$$;
	CREATE FUNCTION app.store_two(day date, path text, counter bigint) RETURNS void LANGUAGE sql AS $$
		INSERT INTO app.stored AS s VALUES (day || ' ' || path, counter)
		ON CONFLICT (key) DO UPDATE SET total = s.total + EXCLUDED.total
	$$;
	CREATE FOREIGN TABLE app.hits (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'app.store', interval '1h', jitter '1s', timeout '1min', backoff '2s',
		restart 'temporary', shutdown '0', batch_size '17', batch_time '2s', handler_timeout '3s');
	COMMENT ON FOREIGN TABLE app.hits IS 'what is looked at';
	COMMENT ON COLUMN app.hits.key IS 'the page';
	GRANT INSERT ON app.hits TO app;
	GRANT SELECT ON app.hits TO reader WITH GRANT OPTION;
	GRANT INSERT (key) ON app.hits TO reader;

	-- stopped, with several key columns, a domain, quoted names
	CREATE DOMAIN app.path AS text CHECK (VALUE LIKE '/%');
	CREATE FOREIGN TABLE app."Two Keys" ("the day" date NOT NULL, path app.path, n bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'app.store_two', interval '1h');
	SELECT ext.sb_stop('app."Two Keys"');

	-- a partition of a table, and a trigger that counts
	CREATE TABLE app.split (key text NOT NULL, count bigint NOT NULL DEFAULT 1) PARTITION BY LIST (key);
	CREATE FOREIGN TABLE app.split_rest PARTITION OF app.split DEFAULT
	SERVER statbuffer OPTIONS (handler 'app.store', interval '1h');
	CREATE TABLE app.log (key text);
	CREATE FUNCTION app.count_log() RETURNS trigger LANGUAGE plpgsql AS
		$$ BEGIN PERFORM ext.sb_increment(new.key, 1, 'app.hits'); RETURN NULL; END $$;
	CREATE TRIGGER count_log AFTER INSERT ON app.log FOR EACH ROW EXECUTE FUNCTION app.count_log();
	CREATE VIEW app.live AS SELECT key, count FROM app.hits WHERE count > 1;

	-- the default buffer
	CREATE FUNCTION app.handle_flush(key text, counter bigint) RETURNS void LANGUAGE sql AS
		'SELECT app.store(key, counter)';
	SET search_path = app;
	SELECT ext.sb_start();
	ALTER FOREIGN TABLE ext.sb_default OPTIONS (ADD interval '1h');
});
# Some counts are stored, others held.
$node->safe_psql('shop', q{
	INSERT INTO app.log VALUES ('stored');
	SELECT ext.sb_drain('app.hits');
	INSERT INTO app.log VALUES ('held');
	SELECT ext.sb_increment('held');
});

# All that is defined, to be compared.  OIDs and the database's name are not in it.
my $definitions = q{
	SELECT 'table', c.oid::regclass::text, r.rolname, c.relacl::text, (SELECT string_agg(o, ',' ORDER BY o) FROM unnest(t.ftoptions) AS o), s.srvname,
		obj_description(c.oid, 'pg_class'), pg_get_expr(c.relpartbound, c.oid),
		(SELECT string_agg(concat_ws(' ', attname, format_type(atttypid, atttypmod), attnotnull, attacl,
			col_description(attrelid, attnum), pg_get_expr(adbin, adrelid)), ', ' ORDER BY attnum)
		 FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
		 WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped)
	FROM pg_class c JOIN pg_roles r ON r.oid = c.relowner
		JOIN pg_foreign_table t ON t.ftrelid = c.oid JOIN pg_foreign_server s ON s.oid = t.ftserver
	UNION ALL
	SELECT 'server', srvname, (srvowner = 10)::text, srvacl::text, NULL, NULL, NULL, NULL, NULL FROM pg_foreign_server
	UNION ALL
	SELECT 'member', pg_describe_object(classid, objid, objsubid), NULL, NULL, NULL, NULL, NULL, NULL, NULL
	FROM pg_depend WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e'
		AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'statbuffer')
	UNION ALL
	SELECT 'acl', oid::regclass::text, relacl::text, NULL, NULL, NULL, NULL, NULL, NULL FROM pg_class WHERE relname = 'sb_stat_buffers'
	UNION ALL
	SELECT 'acl', oid::regprocedure::text, proacl::text, NULL, NULL, NULL, NULL, NULL, NULL FROM pg_proc
	WHERE proname LIKE 'sb!_%' ESCAPE '!'
	ORDER BY 1, 2
};
my $original = $node->safe_psql('shop', $definitions);
like($original, qr/table\|app\.hits\|keeper\|.*batch_size=17.*what is looked at/, 'there is something to compare');
like($original, qr/table\|ext\.sb_default\|keeper\|/, 'the default buffer, too');
like($original, qr/stopped=true/, 'and one that is stopped');

# A restored database works.
sub check_works
{
	my ($server, $db, $what) = @_;

	is($server->safe_psql($db, $definitions), $original, "$what: everything is defined as it was");
	is($server->safe_psql($db, q{SELECT coalesce(sum(pending), 0) FROM ext.sb_stat_buffers}), 0, "$what: nothing is counted");
	my $before = $server->safe_psql($db, 'SELECT coalesce(sum(total), 0) FROM app.stored');
	$server->safe_psql($db, q{
		INSERT INTO app.log VALUES ('new');
		INSERT INTO app.split VALUES ('split', 10);
		SELECT ext.sb_increment('default', 100)});
	is($server->safe_psql($db, q{SELECT ext.sb_drain('app.hits'), ext.sb_drain('app.split_rest'), ext.sb_drain()}),
		't|t|t', "$what: increments are flushed");
	is($server->safe_psql($db, q{SELECT sum(total) FROM app.stored}), $before + 111, "$what: and stored");
	my ($status, $out, $err) = $server->psql($db, q{SELECT ext.sb_increment(ROW('2026-01-01', '/'), 1, 'app."Two Keys"')});
	like($err, qr/buffer "Two Keys" is stopped.*HINT: +Call sb_start/s, "$what: what was stopped is stopped");
	$server->safe_psql($db, q{
		SELECT ext.sb_start('app."Two Keys"');
		SELECT ext.sb_increment(ROW('2026-01-01', '/'), 1000, 'app."Two Keys"');
		SELECT ext.sb_drain('app."Two Keys"')});
	is($server->safe_psql($db, q{SELECT sum(total) FROM app.stored}), $before + 1111, "$what: until it is started");
}

# --- pg_dump ----------------------------------------------------------------

# Restored into databases of other names, on the same server, in all formats
my $offset = -s $node->logfile;
$node->command_ok([ 'pg_dump', '-f', "$dir/plain.sql", 'shop' ], 'pg_dump, plain');
$node->command_ok([ 'pg_dump', '-Fc', '-f', "$dir/custom", 'shop' ], 'pg_dump, custom');
$node->command_ok([ 'pg_dump', '-Fd', '-j2', '-f', "$dir/directory", 'shop' ], 'pg_dump, directory, in parallel');
is(lines_in_log($node, 'ERROR', $offset), 0, 'no error is met');
is($node->safe_psql('shop', q{SELECT count FROM app.hits}), 1, 'what is held is held by the original');

my $dump = slurp_file("$dir/plain.sql");
like($dump, qr/CREATE EXTENSION IF NOT EXISTS statbuffer WITH SCHEMA ext/, 'the extension is in the dump');
like($dump, qr/CREATE FOREIGN TABLE ext\.sb_default/, "the default buffer is, in the extension's schema");
unlike($dump, qr/CREATE (SERVER|FOREIGN DATA WRAPPER|FUNCTION ext\.)/, "the extension's own objects are not");
unlike($dump, qr/^(COPY|INSERT INTO) (app\.hits|ext\.sb_default)/m, 'nor is what is counted');

$node->safe_psql('postgres', 'CREATE DATABASE plain');
$node->command_ok([ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('plain'), '-f', "$dir/plain.sql" ],
	'the plain one is restored');
check_works($node, 'plain', 'plain');

$node->safe_psql('postgres', 'CREATE DATABASE custom');
$node->command_ok([ 'pg_restore', '-e', '-d', 'custom', "$dir/custom" ], 'pg_restore, custom');
check_works($node, 'custom', 'custom');

$node->safe_psql('postgres', 'CREATE DATABASE directory');
$node->command_ok([ 'pg_restore', '-e', '-j2', '-d', 'directory', "$dir/directory" ], 'pg_restore, directory, in parallel');
check_works($node, 'directory', 'directory');

# In sections, one after the other
$node->safe_psql('postgres', 'CREATE DATABASE sections');
foreach my $section (qw(pre-data data post-data))
{
	$node->command_ok([ 'pg_restore', '-e', "--section=$section", '-d', 'sections', "$dir/custom" ], "pg_restore, $section");
}
is($node->safe_psql('sections', 'SELECT * FROM app.stored'), 'stored|1', 'what was stored is there');
# Triggers come last, so the restored rows of the log were not counted again.
check_works($node, 'sections', 'sections');

# The schema only, and only one of the tables
$node->safe_psql('postgres', 'CREATE DATABASE empty');
$node->command_ok([ 'pg_restore', '-e', '--schema-only', '-d', 'empty', "$dir/custom" ], 'pg_restore, schema only');
is($node->safe_psql('empty', 'SELECT count(*) FROM app.stored'), '0', 'nothing is stored');
check_works($node, 'empty', 'schema only');

# Dropped and made anew where it was; a worker that is busy there does not keep
# it from being done.
$node->safe_psql('custom', q{SELECT ext.sb_increment('k', 5, 'app.hits')});
$node->command_ok([ 'pg_restore', '-e', '--clean', '--if-exists', '-d', 'custom', "$dir/custom" ], 'pg_restore --clean');
check_works($node, 'custom', 'once more');

# Without owners and grants, by another role, as to a server that has none of them
$node->safe_psql('postgres', 'CREATE DATABASE nobodys');
$node->command_ok([ 'pg_restore', '-e', '-O', '-x', '-d', 'nobodys', "$dir/custom" ], 'pg_restore, without owners and privileges');
is($node->safe_psql('nobodys', q{SELECT DISTINCT relowner::regrole FROM pg_class WHERE relkind = 'f'}),
	$node->safe_psql('nobodys', 'SELECT current_user'), 'the buffers belong to whoever restores');
$node->safe_psql('nobodys', q{SELECT ext.sb_increment('k', 5, 'app.hits')});
is($node->safe_psql('nobodys', q{SELECT ext.sb_drain('app.hits')}), 't', 'and work as his');

# Counts are only dumped when they are asked for; to restore them is to count
# them a second time.
$node->command_ok([ 'pg_dump', '-a', '--include-foreign-data=statbuffer', '-t', 'app.hits', '-f', "$dir/counts.sql", 'shop' ],
	'pg_dump --include-foreign-data');
$node->safe_psql('plain', 'TRUNCATE app.hits');
$node->command_ok([ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('plain'), '-f', "$dir/counts.sql" ],
	'is restored');
is($node->safe_psql('plain', 'SELECT * FROM app.hits'), 'held|1', 'as increments');

# A copy by CREATE DATABASE has no counts either.
$node->safe_psql('shop', q{SELECT ext.sb_stop('app.hits')});
$node->safe_psql('shop', q{SELECT ext.sb_start('app.hits')});
# (Whoever makes it has to know of statbuffer, to have its workers leave.)
$node->command_ok([ 'psql', '-X', '-q', '-d', $node->connstr('postgres'), '-c', q{LOAD 'statbuffer'}, '-c', 'CREATE DATABASE copy TEMPLATE shop' ],
	'CREATE DATABASE with a template');
check_works($node, 'copy', 'a copy by CREATE DATABASE');

# --- to another server ------------------------------------------------------

$node->command_ok([ 'pg_dumpall', '-f', "$dir/all.sql" ], 'pg_dumpall');
my $other = PostgreSQL::Test::Cluster->new('other');
$other->init;
$other->append_conf('postgresql.conf', q{
shared_preload_libraries = 'statbuffer'
max_worker_processes = 16
log_line_prefix = '%m [%p] %b %q%a '
});
$other->start;
# the role that restores is there already
$other->psql('postgres', slurp_file("$dir/all.sql") =~ s/^CREATE ROLE \Q@{[ $node->safe_psql('postgres', 'SELECT current_user') ]}\E;$//mr);
check_works($other, 'shop', 'another server');
$other->stop;

# --- pg_basebackup ----------------------------------------------------------

# Of a server that is counting: the copy has what was stored, and not what was
# held, which is in the memory of the original.
$node->safe_psql('shop', q{SELECT ext.sb_increment('in memory', 7, 'app.hits')});
$node->backup('backup');
is($node->safe_psql('shop', q{SELECT ext.sb_count('in memory', 'app.hits')}), 7, 'the original holds its count');
my $copy = PostgreSQL::Test::Cluster->new('copy');
$copy->init_from_backup($node, 'backup');
$copy->start;
is($copy->safe_psql('shop', q{SELECT ext.sb_count('in memory', 'app.hits')}), '', 'the copy does not');
check_works($copy, 'shop', 'a base backup');
$copy->stop;

# But for a file of saved counts that is still there, because nobody has loaded
# it yet: it comes along, and the copy counts it.
$node->safe_psql('shop', q{
	DO $$ BEGIN ALTER FOREIGN TABLE app.hits OPTIONS (ADD shutdown '0');
	EXCEPTION WHEN duplicate_object THEN ALTER FOREIGN TABLE app.hits OPTIONS (SET shutdown '0'); END $$;
	SELECT ext.sb_increment('saved', 7, 'app.hits')});
$node->adjust_conf('postgresql.conf', 'shared_preload_libraries', q{''});
$node->restart;
$node->backup('unloaded');
my $unloaded = PostgreSQL::Test::Cluster->new('unloaded');
$unloaded->init_from_backup($node, 'unloaded');
$unloaded->start;
is($unloaded->safe_psql('shop', q{SELECT ext.sb_count('saved', 'app.hits')}), 7, 'a copy loads counts that the original had not loaded yet');
is($node->safe_psql('shop', q{SELECT ext.sb_count('saved', 'app.hits')}), 7, 'and the original has them, too');
$unloaded->stop;

$node->stop;
done_testing();
