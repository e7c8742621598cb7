# The server makes what a library exports known to all that are loaded after it.
# So a library that is loaded before ours and has functions and variables of the
# same names is no concern of ours, nor are ours of others: what we export is
# what the server looks up by name.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use TestLibrary;

plan skip_all => 'nm is not there' if system('nm --version >/dev/null 2>&1') != 0;
chomp(my $libdir = qx{pg_config --pkglibdir});
my $library = "$libdir/statbuffer.so";

# nm prints a value, which undefined ones have not, a type and a name.
sub symbols
{
	my @options = @_;

	return map { (split)[ 1, 2 ] } split /\n/, qx{nm @options --defined-only $library};
}

my $node = new_node('main');
my $db = 'postgres';

# --- what is exported -------------------------------------------------------

my %wanted = map { $_ => 1 } (
	qw(Pg_magic_func _PG_init statbuffer_keeper_main statbuffer_launcher_main statbuffer_worker_main),
	map { ($_, "pg_finfo_$_") } split /\n/,
	sql(q{SELECT DISTINCT prosrc FROM pg_proc WHERE probin = '$libdir/statbuffer'}));
my %exported = reverse symbols('-D');

cmp_ok(scalar keys %wanted, '>', 20, 'the SQL functions are in the catalog');
is_deeply([ sort keys %exported ], [ sort keys %wanted ], 'nothing is exported but what is looked up by name');

# --- a neighbour with all of our names --------------------------------------

my %all = reverse symbols();
my %ours = map { $_ => $all{$_} } grep { /^[A-Za-z]\w*$/ && !$wanted{$_} && !/^(de)?register_tm_clones/ } keys %all;

SKIP:
{
	skip 'the library was stripped', 1 unless %ours;
	skip 'nothing to build a library with', 1 unless can_build_library();

	cmp_ok(scalar keys %ours, '>', 200, 'our own names are known');
	ok(exists $ours{buffer_open} && exists $ours{shared_control}, 'functions and variables');

	# Whoever calls its functions is told of, and ends.  Its variables have
	# nothing in them that would make sense to us.
	my $code = "extern void neighbour_called(const char *name);\n";
	foreach my $name (sort keys %ours)
	{
		$code .= $ours{$name} =~ /^[tT]$/
		  ? "void $name(void) { neighbour_called(\"$name\"); }\n"
		  : "char ${name}[4096] = {0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55};\n";
	}
	my $neighbour = build_library('neighbour', $code, q{
		#include "postgres.h"
		#include "fmgr.h"

		PG_MODULE_MAGIC;

		#pragma GCC visibility push(default)
		void neighbour_called(const char *name)
		{
			elog(FATAL, "the neighbour's %s was called", name);
		}
	});

	# Everything that counts, shows, flushes and saves
	sub test_with_neighbour
	{
		my ($how, $preload) = @_;

		$node->append_conf('postgresql.conf', "shared_preload_libraries = '$preload'");
		$node->restart;
		make_buffer($node, $db, $how, q{interval '50ms', timeout '1h'});
		sql(qq{CREATE TABLE ${how}_rows (k text);
			CREATE TRIGGER count_rows AFTER INSERT ON ${how}_rows
			FOR EACH ROW EXECUTE FUNCTION sb_trigger('$how', 'k')});
		my $gate = close_gate($node, $db);
		sql(qq{SELECT sb_increment('a', 1, '$how');
			SELECT sb_async_increment('a', 2, '$how');
			INSERT INTO $how VALUES ('b', 3);
			INSERT INTO ${how}_rows VALUES ('b')});
		is(sql(qq{SELECT sum(count) FROM $how}), '7', "$how: the buffer shows what was counted");
		is(sql(qq{SELECT sum(keys) FROM sb_stat_buffers WHERE relid = '$how'::regclass}), '2', "$how: so does the view");
		open_gate($gate);
		is(sql(qq{SELECT sb_drain('$how')}), 't', "$how: launcher and worker came");
		is(stored($node, $db, $how), '7', "$how: and stored it");
		sql(qq{ALTER FOREIGN TABLE $how OPTIONS (SET interval '1h', ADD shutdown '0')});
		sql(qq{SELECT sb_drain('$how')});    # so the worker knows
		sql(qq{SELECT sb_increment('c', 5, '$how')});
		$node->restart;
		sql(qq{SELECT sb_increment('c', 1, '$how')});
		wait_for($node, $db, qq{SELECT sb_count('c', '$how') = 6}, "$how: what was held was saved and loaded");
		is(sql(qq{SELECT sb_drain('$how')}), 't', "$how: and is flushed");
		is(stored($node, $db, $how), '13', "$how: all of it");
	}
	test_with_neighbour('before_us', "$neighbour,statbuffer");
	test_with_neighbour('alone', $neighbour);
	is(lines_in_log($node, "the neighbour's"), 0, 'nothing of the neighbour was called');

	# The neighbour is there and is heard of: whoever calls it does end so.
	my ($status, $out, $err) = $node->psql($db, qq{
		CREATE FUNCTION neighbours() RETURNS void LANGUAGE c AS '$neighbour', 'buffer_open'});
	like($err, qr/could not find function information for function "buffer_open"/,
		'it has a function of such a name');
}

# --- compiled at run time ---------------------------------------------------

# The compiler may take our functions into its own code, from the bitcode that
# was installed with the library.  What these call is then looked up by name.
SKIP:
{
	skip 'this server does not compile at run time', 1 unless sql('SELECT pg_jit_available()') eq 't';

	my $jit = q{SET jit = on; SET jit_above_cost = 0; SET jit_inline_above_cost = 0; SET jit_optimize_above_cost = 0;};
	make_buffer($node, $db, 'compiled', q{interval '1h', timeout '1h'});
	my %calls = (
		sb_increment => q{sb_increment('k' || i % 3, 1, 'compiled')},
		sb_async_increment => q{sb_async_increment('k' || i % 3, 1, 'compiled')},
		sb_count => q{sb_count('k' || i % 3, 'compiled')},
		sb_flush => q{sb_flush('none' || i, 'compiled')},
		sb_flush_all => q{sb_flush_all('sb_other')},
		sb_stat_reset => q{sb_stat_reset('sb_other')},
		sb_start => q{sb_start('sb_other')},
		sb_drain => q{sb_drain('sb_other')});
	make_buffer($node, $db, 'sb_other', q{interval '1h', timeout '1h'});
	foreach my $call (sort keys %calls)
	{
		my ($status, $out, $err) = $node->psql($db, qq{$jit
			SELECT count($calls{$call}) FROM generate_series(1, 30) i});

		is($err, '', "compiled, $call() finds what it calls");
		is($out, '30', "and is called");
	}
	is(sql(q{SELECT sum(count) FROM compiled}), '60', 'each call has counted');
}

$node->stop;
done_testing();
