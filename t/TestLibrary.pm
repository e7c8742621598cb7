# Small C libraries that tests build and have a server load.

package TestLibrary;

use strict;
use warnings;

use Exporter 'import';
use PostgreSQL::Test::Utils;

our @EXPORT = qw(can_build_library build_library);

sub pg_config
{
	my ($option) = @_;

	chomp(my $value = qx{pg_config --$option});
	return $value;
}

# Are a compiler and the server's headers there?
sub can_build_library
{
	my ($cc) = split / /, pg_config('cc');

	return -f pg_config('includedir-server') . '/postgres.h'
	  && system("$cc --version >/dev/null 2>&1") == 0;
}

# build_library(NAME, SOURCE...): a library of these texts of C, each compiled by
# itself.  Returns its path; it is there until the test ends.
sub build_library
{
	my ($name, @sources) = @_;
	my $dir = PostgreSQL::Test::Utils::tempdir;
	my @files;

	foreach my $i (0 .. $#sources)
	{
		push @files, "$dir/$name$i.c";
		append_to_file($files[-1], $sources[$i]);
	}
	system_or_bail(split(/ /, pg_config('cc')), '-shared', '-fPIC', '-fno-builtin', '-O1', '-w',
		'-I' . pg_config('includedir-server'), '-o', "$dir/$name.so", @files);
	return "$dir/$name.so";
}

1;
